// SPDX-License-Identifier: GPL-2.0
/* KDP_PAGING: switching demand paging while the memslot is in use. */
#include "test.h"

#define PAGES	1024

FIXTURE(abi) {
	int vm;
	struct slot s;
};

FIXTURE_VARIANT(abi) {
	bool hugetlb;
};

FIXTURE_VARIANT_ADD(abi, shmem) { .hugetlb = false };
FIXTURE_VARIANT_ADD(abi, hugetlb) { .hugetlb = true };

FIXTURE_SETUP(abi)
{
	if (variant->hugetlb && !hugetlb_reserve(2))
		SKIP(return, "no two free 2 MiB pages");
	self->vm = vm_open(_metadata);
	self->s = slot_on(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING, variant->hugetlb);
	for (int page = 0; page < PAGES; page++)
		self->s.alias[page * PAGE] = page * 3 + 1;
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

static __u32 paging_of(struct slot *s)
{
	struct kdp_memslot_get get;

	return kdp_get(s->vm, s->id, 0, &get) ? ~0U : get.paging;
}

static __u64 bits_set(struct slot *s)
{
	__u64 n = 0;

	for (__u64 page = 0; page < s->pages; page++)
		n += bit_get(s->bitmap, page);
	return n;
}

TEST_F(abi, paging_is_reported)
{
	struct slot *s = &self->s;

	EXPECT_EQ(KDP_PAGING_ON, paging_of(s));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_EQ(KDP_PAGING_OFF, paging_of(s));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_EQ(KDP_PAGING_OFF, paging_of(s));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON_PRESENT));
	EXPECT_EQ(KDP_PAGING_ON, paging_of(s));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	EXPECT_EQ(KDP_PAGING_ON, paging_of(s));
}

TEST_F(abi, paging_off_makes_all_present)
{
	struct slot *s = &self->s;

	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 0, 1);
	EXPECT_BYTE(1, s->guest);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	for (int page = 0; page < PAGES; page += 37) {
		EXPECT_BYTE((unsigned char)(page * 3 + 1), s->guest + page * PAGE);
		EXPECT_EQ(0, touch_write(s->guest + page * PAGE + 8, page));
		EXPECT_EQ((unsigned char)page, s->alias[page * PAGE + 8]);
	}
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(abi, paging_off_wakes_waiters)
{
	struct toucher t[3] = { 0 };
	struct slot *s = &self->s;

	wait_begins(_metadata, s, &t[0], 10, TOUCH_READ);
	wait_begins(_metadata, s, &t[1], 11, TOUCH_KERNEL);
	/* One whose event nobody has read. */
	ASSERT_TRUE(toucher_start(&t[2], s->guest + 700 * PAGE, TOUCH_READ));
	ASSERT_TRUE(event_pending(s->vm, PATIENCE_MS));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	for (int i = 0; i < 3; i++) {
		ASSERT_TRUE(toucher_join(&t[i]));
		EXPECT_EQ(0, t[i].result);
	}
	EXPECT_EQ(31, t[0].val);
	EXPECT_EQ(34, t[1].val);
	EXPECT_EQ((unsigned char)(700 * 3 + 1), t[2].val);
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(abi, paging_off_gives_the_bitmap_back)
{
	struct slot *s = &self->s;
	unsigned char val, *p;

	EXPECT_MARK(3, s, KDP_STATE_PRESENT, 0, 3);
	EXPECT_EQ(7, atomic_load(s->bitmap));
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_EQ(SIGBUS, touch_read(s->bitmap, &val));
	EXPECT_EQ(SIGBUS, touch_or(s->bitmap, 1));
	p = map(s->fd, PAGE, PROT_READ | PROT_WRITE, KDP_BITMAP_OFFSET);
	if (p != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch_read(p, &val));
	}
	/* The same mapping shows the fresh bitmap when paging comes back. */
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	EXPECT_EQ(0, touch_read(s->bitmap, &val));
	EXPECT_EQ(0, bits_set(s));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 9, 1);
	EXPECT_TRUE(bit_get(s->bitmap, 9));
}

TEST_F(abi, paging_on_makes_all_absent)
{
	struct toucher t = { 0 };
	struct slot *s = &self->s;

	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	/* Mapped, and with paging off perhaps as one block. */
	for (int page = 0; page < PAGES; page++) {
		unsigned char val;

		ASSERT_EQ(0, touch_read(s->guest + page * PAGE, &val));
	}
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	EXPECT_EQ(0, bits_set(s));
	wait_begins(_metadata, s, &t, 600, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 600, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ((unsigned char)(600 * 3 + 1), t.val);
	/* Its neighbours in the block are still absent. */
	wait_begins(_metadata, s, &t, 601, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 601, 1);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(abi, paging_on_again_starts_afresh)
{
	struct toucher t = { 0 };
	struct slot *s = &self->s;

	EXPECT_MARK(PAGES, s, KDP_STATE_PRESENT, 0, PAGES);
	EXPECT_BYTE(1, s->guest);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	EXPECT_EQ(0, bits_set(s));
	wait_begins(_metadata, s, &t, 0, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 0, 1);
	ASSERT_TRUE(toucher_join(&t));
	/* A page that was zero is absent now, too. */
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 5, 1);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	EXPECT_MARK(0, s, KDP_STATE_ABSENT, 0, PAGES);
}

/* Those who wait when paging is switched on again wait for the same page in the fresh bitmap. */
TEST_F(abi, paging_on_again_keeps_waiters)
{
	struct toucher t = { 0 };
	struct slot *s = &self->s;

	wait_begins(_metadata, s, &t, 2, TOUCH_READ);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
	usleep(QUIET_MS * 1000);
	EXPECT_EQ(0, atomic_load(&t.done));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 2, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(7, t.val);
}

TEST_F(abi, paging_on_present)
{
	struct toucher t = { 0 };
	struct slot *s = &self->s;

	for (int from = 0; from < 2; from++) {
		EXPECT_EQ(0, kdp_paging(s->vm, s->id, from ? KDP_PAGING_OFF : KDP_PAGING_ON));
		EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON_PRESENT));
		EXPECT_EQ(PAGES, bits_set(s));
		EXPECT_BYTE((unsigned char)(1023 * 3 + 1), s->guest + 1023 * PAGE);
		EXPECT_MARK(1, s, KDP_STATE_ABSENT, 1023, 1);
		wait_begins(_metadata, s, &t, 1023, TOUCH_READ);
		EXPECT_BYTE((unsigned char)(1022 * 3 + 1), s->guest + 1022 * PAGE);
		EXPECT_MARK(1, s, KDP_STATE_PRESENT, 1023, 1);
		ASSERT_TRUE(toucher_join(&t));
		EXPECT_EQ((unsigned char)(1023 * 3 + 1), t.val);
	}
}

TEST_F(abi, paging_on_present_wakes_waiters)
{
	struct toucher t = { 0 };
	struct slot *s = &self->s;

	wait_begins(_metadata, s, &t, 4, TOUCH_READ);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON_PRESENT));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(13, t.val);
}

/* Pages that are known to hold nothing do not show what the memfd held before. */
TEST_F(abi, paging_off_fills_zero_pages)
{
	static const __u32 modes[] = { KDP_PAGING_OFF, KDP_PAGING_ON_PRESENT };
	struct slot *s = &self->s;

	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON));
		memset(s->alias, 0xee, PAGES * PAGE);
		EXPECT_MARK(3, s, KDP_STATE_ZERO, 510, 3);
		EXPECT_MARK(1, s, KDP_STATE_ZERO, PAGES - 1, 1);
		/* One that is in use already keeps what was written to it. */
		EXPECT_EQ(0, touch_write(s->guest + 511 * PAGE, 0x11));
		EXPECT_EQ(0, kdp_paging(s->vm, s->id, modes[i]));
		EXPECT_BYTE(0, s->guest + 510 * PAGE);
		EXPECT_BYTE(0x11, s->guest + 511 * PAGE);
		EXPECT_BYTE(0, s->guest + 511 * PAGE + 1);
		EXPECT_BYTE(0, s->guest + 512 * PAGE + PAGE - 1);
		EXPECT_BYTE(0, s->guest + (PAGES - 1) * PAGE);
		EXPECT_BYTE(0xee, s->guest + 509 * PAGE);
		EXPECT_BYTE(0xee, s->guest + 513 * PAGE);
	}
}

TEST_F(abi, paging_switches_while_in_use)
{
	struct slot *s = &self->s;
	int stop_pipe[2];
	pid_t child;

	ASSERT_EQ(0, pipe2(stop_pipe, O_CLOEXEC | O_NONBLOCK));
	/* A child reads all the time what it must always find. */
	child = fork();
	if (!child) {
		char c;

		while (read(stop_pipe[0], &c, 1) < 0)
			for (int page = 0; page < PAGES; page += 61) {
				unsigned char val;

				if (touch_read(s->guest + page * PAGE, &val) ||
				    val != (unsigned char)(page * 3 + 1))
					_exit(1);
			}
		_exit(0);
	}
	for (int i = 0; i < 60; i++) {
		static const __u32 modes[] = { KDP_PAGING_ON, KDP_PAGING_OFF, KDP_PAGING_ON_PRESENT };

		EXPECT_EQ(0, kdp_paging(s->vm, s->id, modes[i % 3]));
		if (i % 3 == 0) {
			EXPECT_EQ(0, kdp_mark(s->vm, s->id, KDP_STATE_PRESENT, 0, PAGES / 2).err);
		}
	}
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_EQ(1, write(stop_pipe[1], "x", 1));
	EXPECT_EQ(0, child_status(child));
}

/* OFF fills zero pages first. Killed meanwhile, it has changed nothing else. */
TEST_F(abi, paging_off_dies_on_a_fatal_signal)
{
	const __u64 pages = 16384;
	struct slot s;

	if (variant->hugetlb)
		SKIP(return, "the same for all backings");
	s = slot_on(_metadata, self->vm, 2, pages, KDP_MEMSLOT_PAGING, false);
	/* At different places, with luck: whatever the place, what is left is as it was. */
	for (int delay_ms = 0; delay_ms < 60; delay_ms += 7) {
		pid_t child;
		int status;

		ASSERT_EQ(0, kdp_paging(s.vm, s.id, KDP_PAGING_ON));
		ASSERT_EQ(0, kdp_mark(s.vm, s.id, KDP_STATE_ZERO, 0, pages - 1).err);
		child = fork();
		if (!child)
			_exit(kdp_paging(s.vm, s.id, KDP_PAGING_OFF) ? 1 : 0);
		usleep(delay_ms * 1000);
		ASSERT_EQ(0, kill(child, SIGKILL));
		ASSERT_EQ(child, waitpid(child, &status, 0));
		if (!WIFSIGNALED(status)) {
			EXPECT_EQ(0, WEXITSTATUS(status));
			continue;
		}
		EXPECT_EQ(KDP_PAGING_ON, paging_of(&s));
		/* The page that was absent is absent; the others are zero, filled or not. */
		EXPECT_EQ(0, bit_get(s.bitmap, pages - 1));
		EXPECT_BYTE(0, s.guest);
		EXPECT_BYTE(0, s.guest + (pages - 2) * PAGE);
		EXPECT_EQ(1, kdp_mark(s.vm, s.id, KDP_STATE_PRESENT, pages - 1, 1).changed);
	}
}
