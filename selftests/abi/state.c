// SPDX-License-Identifier: GPL-2.0
/* The page states as those who touch the pages see them. No KVM: threads of this process. */
#include "test.h"

#define PAGES	1024

FIXTURE(state) {
	int vm;
	struct slot s;
};

FIXTURE_VARIANT(state) {
	bool hugetlb;
};

FIXTURE_VARIANT_ADD(state, shmem) { .hugetlb = false };
FIXTURE_VARIANT_ADD(state, hugetlb) { .hugetlb = true };

FIXTURE_SETUP(state)
{
	if (variant->hugetlb && !hugetlb_reserve(2))
		SKIP(return, "no two free 2 MiB pages");
	self->vm = vm_open(_metadata);
	self->s = slot_on(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING, variant->hugetlb);
}

FIXTURE_TEARDOWN(state)
{
	close(self->vm);
}

static void fill(struct slot *s, __u64 page, unsigned char byte)
{
	memset(s->alias + page * PAGE, byte, PAGE);
}

static bool all_bytes_are(const unsigned char *p, unsigned char byte)
{
	for (size_t i = 0; i < PAGE; i++)
		if (p[i] != byte)
			return false;
	return true;
}

TEST_F(state, absent_waits_until_present)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	for (int kind = TOUCH_READ; kind <= TOUCH_KERNEL; kind++) {
		__u64 page = 3 + kind;

		t.val = 0x99;
		wait_begins(_metadata, s, &t, page, kind);
		usleep(QUIET_MS * 1000);
		EXPECT_EQ(0, atomic_load(&t.done));
		fill(s, page, 0x40 + kind);
		EXPECT_MARK(1, s, KDP_STATE_PRESENT, page, 1);
		ASSERT_TRUE(toucher_join(&t));
		EXPECT_EQ(0, t.result);
		if (kind == TOUCH_WRITE) {
			EXPECT_EQ(0x99, s->alias[page * PAGE]);
			EXPECT_EQ(0x40 + kind, s->alias[page * PAGE + 1]);
		} else {
			EXPECT_EQ(0x40 + kind, t.val);
		}
		EXPECT_TRUE(bit_get(s->bitmap, page));
		EXPECT_FALSE(event_pending(s->vm, 0));
	}
}

TEST_F(state, present_needs_no_event)
{
	struct slot *s = &self->s;

	for (__u64 page = 510; page < 515; page++)
		fill(s, page, page);
	EXPECT_MARK(5, s, KDP_STATE_PRESENT, 510, 5);
	for (__u64 page = 510; page < 515; page++) {
		EXPECT_BYTE((unsigned char)page, s->guest + page * PAGE);
		EXPECT_BYTE((unsigned char)page, s->guest + page * PAGE + PAGE - 1);
	}
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(state, first_and_last_page)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	for (int i = 0; i < 2; i++) {
		__u64 page = i ? PAGES - 1 : 0;
		struct kdp_event ev = wait_begins(_metadata, s, &t, page, TOUCH_READ);

		EXPECT_EQ(s->base_gfn + page, ev.gfn);
		fill(s, page, 0x80 + i);
		EXPECT_MARK(1, s, KDP_STATE_PRESENT, page, 1);
		ASSERT_TRUE(toucher_join(&t));
		EXPECT_EQ(0x80 + i, t.val);
	}
}

TEST_F(state, bit_set_by_hand_resolves)
{
	struct slot *s = &self->s;

	fill(s, 9, 0x19);
	bit_set(s->bitmap, 9);
	EXPECT_BYTE(0x19, s->guest + 9 * PAGE);
	EXPECT_FALSE(event_pending(s->vm, 0));
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, 9, 1);
}

/* "this is also how to wake waiters of a page whose bit was set by hand" */
TEST_F(state, present_wakes_after_bit_set_by_hand)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	wait_begins(_metadata, s, &t, 20, TOUCH_READ);
	fill(s, 20, 0x20);
	bit_set(s->bitmap, 20);
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, 20, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x20, t.val);
}

TEST_F(state, absent_unmaps)
{
	unsigned char *second = map_rw(_metadata, self->s.fd, PAGES * PAGE, 0);
	struct slot *s = &self->s, view = *s;
	struct toucher t = { 0 };

	for (__u64 page = 30; page < 33; page++)
		fill(s, page, page);
	EXPECT_MARK(3, s, KDP_STATE_PRESENT, 30, 3);
	for (__u64 page = 30; page < 33; page++) {
		EXPECT_BYTE(page, s->guest + page * PAGE);
		EXPECT_BYTE(page, second + page * PAGE);
	}
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 31, 1);
	fill(s, 31, 0x77);
	/* Each mapping waits, and the neighbours do not. */
	EXPECT_BYTE(30, s->guest + 30 * PAGE);
	EXPECT_BYTE(32, second + 32 * PAGE);
	wait_begins(_metadata, s, &t, 31, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 31, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x77, t.val);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 31, 1);
	view.guest = second;
	wait_begins(_metadata, &view, &t, 31, TOUCH_WRITE);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 31, 1);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(state, absent_unmaps_whole_blocks)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	/* All of it is present, and may be mapped by huge entries. */
	EXPECT_MARK(PAGES, s, KDP_STATE_PRESENT, 0, PAGES);
	for (__u64 page = 0; page < PAGES; page++) {
		ASSERT_EQ(0, touch_write(s->guest + page * PAGE, page));
	}
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 700, 1);
	wait_begins(_metadata, s, &t, 700, TOUCH_READ);
	for (__u64 page = 0; page < PAGES; page += 99) {
		EXPECT_BYTE((unsigned char)page, s->guest + page * PAGE);
	}
	EXPECT_EQ(0, atomic_load(&t.done));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 700, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ((unsigned char)700, t.val);
}

TEST_F(state, absent_unmaps_other_processes)
{
	struct slot *s = &self->s;
	int to_child[2], to_parent[2];
	struct kdp_event ev;
	pid_t child;
	char c;

	ASSERT_EQ(0, pipe2(to_child, O_CLOEXEC));
	ASSERT_EQ(0, pipe2(to_parent, O_CLOEXEC));
	fill(s, 1, 0x01);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 1, 1);
	child = fork();
	if (!child) {
		unsigned char *own = map(s->fd, PAGES * PAGE, PROT_READ, 0), val;

		if (own == MAP_FAILED || touch_read(own + PAGE, &val) || val != 1)
			_exit(1);
		if (write(to_parent[1], "x", 1) != 1 || read(to_child[0], &c, 1) != 1)
			_exit(2);
		if (touch_read(own + PAGE, &val) || val != 2)
			_exit(3);
		_exit(0);
	}
	ASSERT_EQ(1, read(to_parent[0], &c, 1));
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 1, 1);
	fill(s, 1, 0x02);
	ASSERT_EQ(1, write(to_child[1], "x", 1));
	ev = event_read(_metadata, s->vm);
	EXPECT_EQ(1, ev.page);
	EXPECT_EQ(child, ev.tid);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 1, 1);
	EXPECT_EQ(0, child_status(child));
}

TEST_F(state, zero_reads_zero_without_event)
{
	struct slot *s = &self->s;

	/* Old bytes lie in the memfd: none of them may be seen, none of the neighbours' touched. */
	for (__u64 page = 39; page < 43; page++)
		fill(s, page, 0xff);
	EXPECT_MARK(2, s, KDP_STATE_ZERO, 40, 2);
	EXPECT_FALSE(bit_get(s->bitmap, 40));
	EXPECT_BYTE(0, s->guest + 40 * PAGE);
	EXPECT_TRUE(bit_get(s->bitmap, 40));
	EXPECT_TRUE(all_bytes_are(s->guest + 40 * PAGE, 0));
	EXPECT_TRUE(all_bytes_are(s->alias + 40 * PAGE, 0));
	EXPECT_TRUE(all_bytes_are(s->alias + 39 * PAGE, 0xff));
	EXPECT_TRUE(all_bytes_are(s->alias + 42 * PAGE, 0xff));
	EXPECT_FALSE(event_pending(s->vm, 0));
	/* The touch made it present: this is no change any more. */
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, 40, 1);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 41, 1);
}

TEST_F(state, zero_is_filled_before_a_write)
{
	struct slot *s = &self->s;

	fill(s, 44, 0xff);
	fill(s, 45, 0xff);
	EXPECT_MARK(2, s, KDP_STATE_ZERO, 44, 2);
	EXPECT_EQ(0, touch_write(s->guest + 44 * PAGE + 100, 0x11));
	EXPECT_EQ(0x11, s->alias[44 * PAGE + 100]);
	s->alias[44 * PAGE + 100] = 0;
	EXPECT_TRUE(all_bytes_are(s->alias + 44 * PAGE, 0));
	EXPECT_FALSE(event_pending(s->vm, 0));

	/* The kernel's copy is a touch, too. */
	struct toucher t = { 0 };

	ASSERT_TRUE(toucher_start(&t, s->guest + 45 * PAGE, TOUCH_KERNEL));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(0, t.val);
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(state, zero_wakes_waiters)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	fill(s, 50, 0xee);
	wait_begins(_metadata, s, &t, 50, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 50, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(0, t.val);
	EXPECT_TRUE(all_bytes_are(s->alias + 50 * PAGE, 0));
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(state, zero_leaves_present_pages)
{
	struct slot *s = &self->s;

	fill(s, 60, 0x60);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 60, 1);
	EXPECT_MARK(0, s, KDP_STATE_ZERO, 60, 1);
	EXPECT_BYTE(0x60, s->guest + 60 * PAGE);
	/* Nor one whose bit was set by hand. */
	fill(s, 61, 0x61);
	bit_set(s->bitmap, 61);
	EXPECT_MARK(0, s, KDP_STATE_ZERO, 61, 1);
	EXPECT_BYTE(0x61, s->guest + 61 * PAGE);
}

TEST_F(state, zero_then_present_shows_the_memfd)
{
	struct slot *s = &self->s;

	EXPECT_MARK(1, s, KDP_STATE_ZERO, 62, 1);
	fill(s, 62, 0x62);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 62, 1);
	EXPECT_BYTE(0x62, s->guest + 62 * PAGE);
	/* And so does a bit set by hand. */
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 63, 1);
	fill(s, 63, 0x63);
	bit_set(s->bitmap, 63);
	EXPECT_BYTE(0x63, s->guest + 63 * PAGE);
}

TEST_F(state, zero_then_absent_waits)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	EXPECT_MARK(1, s, KDP_STATE_ZERO, 64, 1);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 64, 1);
	wait_begins(_metadata, s, &t, 64, TOUCH_READ);
	fill(s, 64, 0x64);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 64, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x64, t.val);
}

/* What is left of the state zero under a bit set by hand must not come back. */
TEST_F(state, zero_is_forgotten_under_a_hand_set_bit)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	EXPECT_MARK(1, s, KDP_STATE_ZERO, 65, 1);
	fill(s, 65, 0x65);
	bit_set(s->bitmap, 65);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 65, 1);
	wait_begins(_metadata, s, &t, 65, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 65, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x65, t.val);
	/* The same when the page was touched in between. */
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 66, 1);
	bit_set(s->bitmap, 66);
	fill(s, 66, 0x66);
	EXPECT_BYTE(0x66, s->guest + 66 * PAGE);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 66, 1);
	wait_begins(_metadata, s, &t, 66, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 66, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x66, t.val);
}

/* Invariant 2: between two absents, a page is placed once. */
TEST_F(state, placed_once)
{
	struct slot *s = &self->s;

	fill(s, 70, 0x70);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 70, 1);
	EXPECT_EQ(0, touch_write(s->guest + 70 * PAGE, 0x71));
	/* A second place, or a late hint that it is free, changes nothing and says so. */
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, 70, 1);
	EXPECT_MARK(0, s, KDP_STATE_ZERO, 70, 1);
	EXPECT_BYTE(0x71, s->guest + 70 * PAGE);
	/* A zero page that was written is not zeroed again. */
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 71, 1);
	EXPECT_EQ(0, touch_write(s->guest + 71 * PAGE, 0x72));
	EXPECT_MARK(0, s, KDP_STATE_ZERO, 71, 1);
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, 71, 1);
	EXPECT_BYTE(0x72, s->guest + 71 * PAGE);
	/* After absent it can be placed again. */
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 70, 1);
	EXPECT_MARK(0, s, KDP_STATE_ABSENT, 70, 1);
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 70, 1);
	EXPECT_BYTE(0, s->guest + 70 * PAGE);
}

/* Invariant 6: no order of calls makes an absent page readable as zeros. */
TEST_F(state, absent_is_never_read_as_zeros)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };
	unsigned char *late;

	/* A memfd with holes, a mapping made later, a page that was zero, one that was paged off. */
	wait_begins(_metadata, s, &t, 80, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 80, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 80, 1);
	late = map_rw(_metadata, s->fd, PAGES * PAGE, 0);
	struct slot view = *s;

	view.guest = late;
	wait_begins(_metadata, &view, &t, 80, TOUCH_READ);
	EXPECT_MARK(0, s, KDP_STATE_ABSENT, 80, 1);
	usleep(QUIET_MS * 1000);
	EXPECT_EQ(0, atomic_load(&t.done)) TH_LOG("marking an absent page absent let a waiter go");
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 80, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	wait_begins(_metadata, s, &t, 80, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 80, 1);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(state, one_call_resolves_many)
{
	struct toucher t[6] = { 0 };
	struct slot *s = &self->s;
	struct kdp_range ranges[] = { { 100, 2 }, { 511, 2 }, { 1000, 1 }, { 1023, 1 } };
	const __u64 pages[] = { 100, 101, 511, 512, 1000, 1023 };
	struct marked m;

	for (int i = 0; i < 6; i++) {
		wait_begins(_metadata, s, &t[i], pages[i], TOUCH_READ);
		fill(s, pages[i], 0x60 + i);
	}
	m = kdp_mark_ranges(s->vm, s->id, KDP_STATE_PRESENT, ranges, 4);
	EXPECT_EQ(0, m.err);
	EXPECT_EQ(4, m.done);
	EXPECT_EQ(6, m.changed);
	for (int i = 0; i < 6; i++) {
		ASSERT_TRUE(toucher_join(&t[i]));
		EXPECT_EQ(0x60 + i, t[i].val);
	}
}

/* Free huge pages, when those of a test before are free, too: what a process had may come back after its end. */
static long settled_free_hugepages(void)
{
	long now = read_number(HUGETLB_SYSFS "free_hugepages"), last;
	int same = 0;

	for (int i = 0; i < 200 && same < 10; i++) {
		usleep(20 * 1000);
		last = now;
		now = read_number(HUGETLB_SYSFS "free_hugepages");
		same = now == last ? same + 1 : 0;
	}
	return now;
}

/* Marking absent gives the memory back: FALLOC_FL_PUNCH_HOLE frees what nobody has pinned. */
TEST_F(state, absent_unpins)
{
	struct slot *s = &self->s;
	long before, held, after;

	if (!variant->hugetlb)
		SKIP(return, "free pages can be counted exactly on hugetlb alone");
	EXPECT_MARK(PAGES, s, KDP_STATE_PRESENT, 0, PAGES);
	before = settled_free_hugepages();
	ASSERT_EQ(0, touch_write(s->guest, 1));
	ASSERT_EQ(0, touch_write(s->guest + 512 * PAGE, 2));
	held = read_number(HUGETLB_SYSFS "free_hugepages");
	EXPECT_EQ(before - 2, held);
	/* One page of the second block stays present: that block stays. */
	EXPECT_MARK(512 + 511, s, KDP_STATE_ABSENT, 0, PAGES - 1);
	EXPECT_MARK(0, s, KDP_STATE_PRESENT, PAGES - 1, 1);
	ASSERT_EQ(0, fallocate(s->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, HUGE));
	after = read_number(HUGETLB_SYSFS "free_hugepages");
	EXPECT_EQ(held + 1, after);
	/* And what was punched out can be filled and used again. */
	fill(s, 5, 0x55);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 5, 1);
	EXPECT_BYTE(0x55, s->guest + 5 * PAGE);
}
