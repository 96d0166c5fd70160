// SPDX-License-Identifier: GPL-2.0
/* mmap(2) of a memslot: guest memory, the bitmap, and what is refused. */
#include "test.h"

#include <sys/poll.h>

#define PAGES	100

FIXTURE(map) {
	int vm;
	struct slot s;
};

FIXTURE_SETUP(map)
{
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
}

FIXTURE_TEARDOWN(map)
{
	close(self->vm);
}

#define EXPECT_NO_MAP(fd, bytes, prot, flags, offset) do {				\
	void *p_ = mmap(NULL, bytes, prot, flags, fd, offset);				\
	EXPECT_EQ(MAP_FAILED, p_)							\
		TH_LOG("%llu bytes at %#llx were mapped", (__u64)(bytes), (__u64)(offset));	\
} while (0)

#define EXPECT_NO_PRIVATE_MAP(fd, offset) do {						\
	const int prots_[] = { PROT_READ, PROT_READ | PROT_WRITE, PROT_NONE };		\
	for (size_t i_ = 0; i_ < ARRAY_SIZE(prots_); i_++) {				\
		EXPECT_NO_MAP(fd, PAGE, prots_[i_], MAP_PRIVATE, offset);		\
		EXPECT_EQ(EINVAL, errno);						\
	}										\
} while (0)

/* The bitmap is never private, and memory of hugetlb is not. */
TEST_F(map, private_is_refused)
{
	EXPECT_NO_PRIVATE_MAP(self->s.fd, KDP_BITMAP_OFFSET);
	if (hugetlb_reserve(1)) {
		struct slot huge = slot_on(_metadata, self->vm, 2, 512, KDP_MEMSLOT_PAGING, true);

		EXPECT_NO_PRIVATE_MAP(huge.fd, 0);
		EXPECT_NO_PRIVATE_MAP(huge.fd, KDP_BITMAP_OFFSET);
	}
}

/*
 * A private mapping of shmem shows the memslot's pages until they are written there. What is
 * written there nobody else sees, and it stays.
 */
TEST_F(map, private_is_private)
{
	struct slot *s = &self->s, view = *s;
	struct toucher t = { .val = 0x42 };
	unsigned char *own = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, s->fd, 0);

	ASSERT_NE(MAP_FAILED, own);
	for (int page = 0; page < 3; page++)
		s->alias[page * PAGE] = 0x20 + page;
	EXPECT_MARK(3, s, KDP_STATE_PRESENT, 0, 3);
	/* Page 0 is read before it is written, page 1 is not. Page 2 is read alone. */
	EXPECT_BYTE(0x20, own);
	EXPECT_BYTE(0x22, own + 2 * PAGE);
	EXPECT_EQ(0, touch_write(own, 0x40));
	EXPECT_EQ(0, touch_write(own + PAGE, 0x41));
	for (int page = 0; page < 2; page++) {
		EXPECT_BYTE(0x40 + page, own + page * PAGE);
		EXPECT_BYTE(0x20 + page, s->guest + page * PAGE);
		EXPECT_EQ(0x20 + page, s->alias[page * PAGE]);
	}
	EXPECT_MARK(3, s, KDP_STATE_ABSENT, 0, 3);
	EXPECT_BYTE(0x40, own);
	EXPECT_BYTE(0x41, own + PAGE);
	EXPECT_EQ(0, touch_write(own + PAGE, 0x51));
	EXPECT_FALSE(event_pending(self->vm, 0));
	/* What is not written is the memslot's page, and absent. Who writes waits for it. */
	view.guest = own;
	wait_begins(_metadata, &view, &t, 2, TOUCH_WRITE);
	s->alias[2 * PAGE] = 0x32;
	s->alias[2 * PAGE + 1] = 0x33;
	EXPECT_MARK(3, s, KDP_STATE_PRESENT, 0, 3);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_BYTE(0x42, own + 2 * PAGE);
	EXPECT_BYTE(0x33, own + 2 * PAGE + 1);
	EXPECT_BYTE(0x32, s->guest + 2 * PAGE);
	/* Copies stay when the memslot's pages come back. */
	EXPECT_BYTE(0x40, own);
	EXPECT_BYTE(0x51, own + PAGE);
	EXPECT_BYTE(0x21, s->guest + PAGE);
}

TEST_F(map, beyond_the_end_is_refused)
{
	const struct { __u64 bytes, offset; } bad[] = {
		{ (PAGES + 1) * PAGE, 0 }, { PAGE, PAGES * PAGE }, { 2 * PAGE, (PAGES - 1) * PAGE },
		{ PAGE, (PAGES + 1) * PAGE }, { PAGE, 1ULL << 40 }, { PAGE, 1ULL << 59 },
		{ PAGE, KDP_BITMAP_OFFSET - PAGE }, { PAGE, 1ULL << 62 }, { 1ULL << 40, 0 },
		{ 2 * PAGE, KDP_BITMAP_OFFSET - PAGE }, { PAGE, (1ULL << 63) - PAGE },
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_NO_MAP(self->s.fd, bad[i].bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
			      bad[i].offset);
	}
}

TEST_F(map, part)
{
	unsigned char *part = map_rw(_metadata, self->s.fd, 2 * PAGE, 50 * PAGE);

	self->s.alias[50 * PAGE] = 0x50;
	self->s.alias[51 * PAGE] = 0x51;
	EXPECT_MARK(2, &self->s, KDP_STATE_PRESENT, 50, 2);
	EXPECT_BYTE(0x50, part);
	EXPECT_BYTE(0x51, part + PAGE);
	/* Its events name the page by its place in the memslot, not in the mapping. */
	EXPECT_MARK(1, &self->s, KDP_STATE_ABSENT, 51, 1);
	struct slot view = self->s;
	struct toucher t = { 0 };

	view.guest = part - 50 * PAGE;
	wait_begins(_metadata, &view, &t, 51, TOUCH_READ);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 51, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x51, t.val);
}

TEST_F(map, bitmap_too_large_is_refused)
{
	EXPECT_NO_MAP(self->s.fd, 2 * PAGE, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET);
	EXPECT_NO_MAP(self->s.fd, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, KDP_BITMAP_OFFSET);
	EXPECT_NO_MAP(self->s.fd, PAGE, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET + PAGE);
	EXPECT_NO_MAP(self->s.fd, 1ULL << 40, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET);
}

TEST_F(map, vm_fd_is_refused)
{
	EXPECT_NO_MAP(self->vm, PAGE, PROT_READ, MAP_SHARED, 0);
	EXPECT_NO_MAP(self->vm, PAGE, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET);
}

/* The system call by which a thread populates a whole new mapping. */
enum populate_by { BY_MAP_POPULATE, BY_MLOCK, BY_MLOCK_ONFAULT, BY_MLOCKALL, BY_MLOCKALL_ONFAULT,
		   BY_MLOCKALL_BEFORE };

struct populator {
	pthread_t thread;
	struct slot *s;
	enum populate_by by;
	unsigned char *p;
	int err;
	atomic_int done;
};

static int populate_after(struct populator *p)
{
	switch (p->by) {
	case BY_MLOCK:
		return mlock(p->p, PAGES * PAGE);
	case BY_MLOCK_ONFAULT:
		return mlock2(p->p, PAGES * PAGE, MLOCK_ONFAULT);
	case BY_MLOCKALL:
		return mlockall(MCL_CURRENT);
	case BY_MLOCKALL_ONFAULT:
		return mlockall(MCL_CURRENT | MCL_ONFAULT);
	default:
		return 0;
	}
}

static void *populate(void *arg)
{
	struct populator *p = arg;
	int flags = MAP_SHARED | (p->by == BY_MAP_POPULATE ? MAP_POPULATE : 0);

	if (p->by == BY_MLOCKALL_BEFORE && mlockall(MCL_FUTURE))
		p->err = errno;
	p->p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, p->s->fd, 0);
	if (p->p == MAP_FAILED || populate_after(p))
		p->err = errno;
	p->done = 1;
	return NULL;
}

/* It waits for each page that is absent, and for no other. */
static void populate_waits(struct __test_metadata *_metadata, struct slot *s,
			   enum populate_by by)
{
	struct populator p = { .s = s, .by = by };
	long long end = now_ms() + PATIENCE_MS;

	for (int page = 0; page < PAGES; page++)
		s->alias[page * PAGE] = page;
	EXPECT_MARK(3, s, KDP_STATE_PRESENT, 0, 3);
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 3, 1);
	ASSERT_EQ(0, pthread_create(&p.thread, NULL, populate, &p));
	for (__u64 page = 4; page < PAGES; page++) {
		struct kdp_event ev = event_read(_metadata, s->vm);

		EXPECT_EQ(page, ev.page);
		EXPECT_TRUE(ev.access & KDP_ACCESS_KERNEL) TH_LOG("access %#x", ev.access);
		EXPECT_EQ(0, atomic_load(&p.done));
		EXPECT_MARK(1, s, KDP_STATE_PRESENT, page, 1);
	}
	while (!p.done && now_ms() < end)
		usleep(500);
	ASSERT_TRUE(p.done);
	ASSERT_EQ(0, pthread_join(p.thread, NULL));
	ASSERT_EQ(0, p.err);
	for (int page = 0; page < PAGES; page++) {
		EXPECT_BYTE(page == 3 ? 0 : page, p.p + page * PAGE);
	}
	EXPECT_FALSE(event_pending(s->vm, 0));
}

TEST_F(map, populate_waits)
{
	populate_waits(_metadata, &self->s, BY_MAP_POPULATE);
}

TEST_F(map, mlock_waits)
{
	populate_waits(_metadata, &self->s, BY_MLOCK);
}

/* MLOCK_ONFAULT waits, too: mlock_fixup() (mm/mlock.c) skips VM_DONTEXPAND and ignores the flag. */
TEST_F(map, mlock_on_fault_waits)
{
	populate_waits(_metadata, &self->s, BY_MLOCK_ONFAULT);
}

TEST_F(map, mlockall_waits)
{
	populate_waits(_metadata, &self->s, BY_MLOCKALL);
}

TEST_F(map, mlockall_on_fault_waits)
{
	populate_waits(_metadata, &self->s, BY_MLOCKALL_ONFAULT);
}

/* After mlockall(MCL_FUTURE), mmap(2) itself waits. */
TEST_F(map, mlockall_before_waits)
{
	populate_waits(_metadata, &self->s, BY_MLOCKALL_BEFORE);
}

/* The kernel does not populate mappings of hugetlb: they are VM_PFNMAP. */
TEST(map_populate_does_not_wait)
{
	int vm = vm_open(_metadata);
	struct slot s;
	void *p;

	if (!hugetlb_reserve(1))
		SKIP(return, "no free 2 MiB page");
	s = slot_on(_metadata, vm, 1, 512, KDP_MEMSLOT_PAGING, true);
	p = mmap(NULL, 512 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, s.fd, 0);
	EXPECT_NE(MAP_FAILED, p);
	EXPECT_FALSE(event_pending(vm, 0));
}

TEST_F(map, read_only_guest_memory)
{
	unsigned char *ro = map(self->s.fd, PAGES * PAGE, PROT_READ, 0);

	ASSERT_NE(MAP_FAILED, ro);
	self->s.alias[0] = 0x12;
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	EXPECT_BYTE(0x12, ro);
	EXPECT_EQ(SIGSEGV, touch_write(ro, 1));
	EXPECT_EQ(0x12, self->s.alias[0]);
	EXPECT_EQ(0, touch_write(self->s.guest, 0x13));
	EXPECT_BYTE(0x13, ro);
}

/* F_SEAL_FUTURE_WRITE of the memfd also applies to mappings of the memslot. */
TEST_F(map, future_write_seal)
{
	struct kdp_memslot_create create = good_create(_metadata, 2, PAGES);
	unsigned char *before, *after, *own;

	create.base_gfn = 1ULL << 30;
	create.flags = 0;
	ASSERT_EQ(0, kdp_create(self->vm, &create));
	before = map(create.fd, PAGES * PAGE, PROT_READ | PROT_WRITE, 0);
	ASSERT_NE(MAP_FAILED, before);
	ASSERT_EQ(0, fcntl(create.memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	EXPECT_EQ(MAP_FAILED, map(create.fd, PAGES * PAGE, PROT_READ | PROT_WRITE, 0));
	EXPECT_EQ(EPERM, errno);
	after = map(create.fd, PAGES * PAGE, PROT_READ, 0);
	ASSERT_NE(MAP_FAILED, after);
	EXPECT_EQ(-1, mprotect(after, PAGE, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EACCES, errno);
	own = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, create.fd, 0);
	ASSERT_NE(MAP_FAILED, own);
	EXPECT_EQ(0, touch_write(before, 7));
	EXPECT_BYTE(7, after);
	EXPECT_EQ(0, touch_write(own, 8));
	EXPECT_BYTE(7, after);
}

TEST_F(map, write_only_by_whom_it_is_allowed)
{
	/* mprotect(2) takes writing away and gives it back; states are not touched by it. */
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	ASSERT_EQ(0, touch_write(self->s.guest, 1));
	ASSERT_EQ(0, mprotect(self->s.guest, PAGES * PAGE, PROT_READ));
	EXPECT_EQ(SIGSEGV, touch_write(self->s.guest, 2));
	EXPECT_BYTE(1, self->s.guest);
	ASSERT_EQ(0, mprotect(self->s.guest, PAGES * PAGE, PROT_NONE));
	unsigned char val;

	EXPECT_EQ(SIGSEGV, touch_read(self->s.guest, &val));
	EXPECT_EQ(SIGSEGV, touch_read(self->s.guest + PAGE, &val));
	EXPECT_FALSE(event_pending(self->vm, 0));
	ASSERT_EQ(0, mprotect(self->s.guest, PAGES * PAGE, PROT_READ | PROT_WRITE));
	EXPECT_EQ(0, touch_write(self->s.guest, 3));
	EXPECT_EQ(3, self->s.alias[0]);
}

struct racer {
	pthread_barrier_t *gate;
	atomic_ullong *last_word;
	volatile unsigned char *p;
	unsigned int delay;
	int result;
};

static void *race_touch(void *arg)
{
	struct racer *r = arg;

	pthread_barrier_wait(r->gate);
	for (volatile unsigned int n = r->delay; n; n--)
		;
	/* One of the two completes the block, and both touch it. */
	if (r->last_word)
		atomic_fetch_or(r->last_word, 1ULL << 63);
	r->result = touch_write(r->p, 1);
	return NULL;
}

/*
 * One thread finds a block incomplete and maps a page of it, another one finds
 * it whole and maps it as one, both for the first time.
 */
TEST(map_huge_and_small_faults_race)
{
	long tainted = read_number("/proc/sys/kernel/tainted");
	unsigned char *area, *fresh;
	int vm = vm_open(_metadata);
	struct slot s;

	if (!hugetlb_reserve(1))
		SKIP(return, "no free 2 MiB page");
	s = slot_on(_metadata, vm, 1, 512, KDP_MEMSLOT_PAGING, true);
	area = mmap(NULL, 2 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, area);
	fresh = (unsigned char *)(((uintptr_t)area + HUGE - 1) & ~(HUGE - 1));
	for (int i = 0; i < 1500; i++) {
		pthread_barrier_t gate;
		struct racer r[2] = {
			{ .gate = &gate, .p = fresh, .delay = i * 7 % 500 },
			{ .gate = &gate, .p = fresh + PAGE, .last_word = &s.bitmap[7],
			  .delay = i * 13 % 500 },
		};
		pthread_t threads[2];

		ASSERT_EQ(fresh, mmap(fresh, HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
				      s.fd, 0));
		EXPECT_EQ(0, kdp_mark(vm, 1, KDP_STATE_PRESENT, 0, 512).err);
		EXPECT_MARK(1, &s, KDP_STATE_ABSENT, 511, 1);
		ASSERT_EQ(0, pthread_barrier_init(&gate, NULL, 2));
		for (int t = 0; t < 2; t++) {
			ASSERT_EQ(0, pthread_create(&threads[t], NULL, race_touch, &r[t]));
		}
		for (int t = 0; t < 2; t++) {
			ASSERT_EQ(0, pthread_join(threads[t], NULL));
			EXPECT_EQ(0, r[t].result);
		}
		ASSERT_EQ(0, munmap(fresh, HUGE));
	}
	EXPECT_EQ(tainted, read_number("/proc/sys/kernel/tainted")) TH_LOG("the kernel has complained");
}

FIXTURE(bitmap) {
	int vm;
	struct slot s;
};

FIXTURE_SETUP(bitmap)
{
	self->vm = vm_open(_metadata);
	/* 2 and a bit pages of bitmap */
	self->s = slot_new(_metadata, self->vm, 1, 2 * 32768 + 100, KDP_MEMSLOT_PAGING);
}

FIXTURE_TEARDOWN(bitmap)
{
	close(self->vm);
}

TEST_F(bitmap, bit_layout)
{
	const __u64 pages[] = {
		0, 1, 7, 8, 31, 32, 63, 64, 65, 127, 128, 32767, 32768, 32769, 65535, 65536, 65635,
	};
	const unsigned char *bytes = (const unsigned char *)self->s.bitmap;

	for (size_t i = 0; i < ARRAY_SIZE(pages); i++) {
		__u64 page = pages[i];
		__u64 words = bitmap_bytes(self->s.pages) / 8;

		EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, page, 1);
		for (__u64 w = 0; w < words; w++) {
			__u64 want = w == page / 64 ? 1ULL << (page % 64) : 0;

			EXPECT_EQ(want, atomic_load(&self->s.bitmap[w]))
				TH_LOG("page %llu, word %llu", page, w);
		}
		/* Little-endian, so page n is bit n % 8 of byte n / 8, as well. */
		EXPECT_EQ(1 << (page % 8), bytes[page / 8]);
		EXPECT_MARK(1, &self->s, KDP_STATE_ABSENT, page, 1);
	}
}

TEST_F(bitmap, length_is_rounded_up_to_a_page)
{
	EXPECT_EQ(3 * PAGE, bitmap_bytes(self->s.pages));
	EXPECT_NO_MAP(self->s.fd, 4 * PAGE, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET);
	EXPECT_NO_MAP(self->s.fd, PAGE, PROT_READ, MAP_SHARED, KDP_BITMAP_OFFSET + 3 * PAGE);
	/* One page of memory has one page of bitmap; so has 128 MiB; 4 KiB more has two. */
	const struct { __u64 pages, bytes; } sizes[] = {
		{ 1, PAGE }, { 32768, PAGE }, { 32769, 2 * PAGE },
	};

	for (__u32 i = 0; i < ARRAY_SIZE(sizes); i++) {
		struct slot s = slot_new(_metadata, self->vm, 10 + i, sizes[i].pages,
					 KDP_MEMSLOT_PAGING);

		EXPECT_EQ(sizes[i].bytes, bitmap_bytes(sizes[i].pages));
		EXPECT_NO_MAP(s.fd, sizes[i].bytes + PAGE, PROT_READ, MAP_SHARED,
			      KDP_BITMAP_OFFSET);
		EXPECT_MARK(1, &s, KDP_STATE_PRESENT, sizes[i].pages - 1, 1);
		EXPECT_TRUE(bit_get(s.bitmap, sizes[i].pages - 1));
	}
}

TEST_F(bitmap, part_is_mapped)
{
	atomic_ullong *second = map_rw(_metadata, self->s.fd, PAGE, KDP_BITMAP_OFFSET + PAGE);

	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 32768 + 5, 1);
	EXPECT_EQ(1ULL << 5, atomic_load(second));
	EXPECT_EQ(0, touch_or(second, 1ULL << 6));
	EXPECT_TRUE(bit_get(self->s.bitmap, 32768 + 6));
}

/* A page of the bitmap that was read before it held anything must not stay a page of zeros. */
TEST_F(bitmap, read_only_mapping_sees_writes)
{
	atomic_ullong *ro = map(self->s.fd, 3 * PAGE, PROT_READ, KDP_BITMAP_OFFSET);

	ASSERT_NE(MAP_FAILED, ro);
	EXPECT_EQ(0, atomic_load(&ro[0]));
	EXPECT_EQ(0, atomic_load(&ro[512]));
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 3, 1);
	EXPECT_EQ(8, atomic_load(&ro[0]));
	EXPECT_EQ(0, touch_or(&self->s.bitmap[512], 2));
	EXPECT_EQ(2, atomic_load(&ro[512]));
	EXPECT_EQ(SIGSEGV, touch_write((void *)ro, 0xff));
	EXPECT_EQ(8, atomic_load(&ro[0]));
}

TEST_F(bitmap, fresh_bitmap_is_zero)
{
	for (__u64 w = 0; w < bitmap_bytes(self->s.pages) / 8; w++) {
		EXPECT_EQ(0, atomic_load(&self->s.bitmap[w]));
	}
}

TEST_F(bitmap, on_present_sets_the_pages_that_exist)
{
	ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON_PRESENT));
	for (__u64 w = 0; w < self->s.pages / 64; w++) {
		EXPECT_EQ(~0ULL, atomic_load(&self->s.bitmap[w]));
	}
	EXPECT_EQ((1ULL << (self->s.pages % 64)) - 1,
		  atomic_load(&self->s.bitmap[self->s.pages / 64]) & ((1ULL << (self->s.pages % 64)) - 1));
}

TEST_F(bitmap, set_by_hand_makes_present)
{
	self->s.alias[77 * PAGE] = 0x77;
	EXPECT_EQ(0, touch_or(&self->s.bitmap[77 / 64], 1ULL << (77 % 64)));
	EXPECT_BYTE(0x77, self->s.guest + 77 * PAGE);
	EXPECT_FALSE(event_pending(self->vm, 0));
	EXPECT_MARK(0, &self->s, KDP_STATE_PRESENT, 77, 1);
	EXPECT_MARK(0, &self->s, KDP_STATE_ZERO, 77, 1);
	EXPECT_MARK(1, &self->s, KDP_STATE_ABSENT, 77, 1);
}

/* Bits past the last page name nothing: they neither count nor break anything. */
TEST_F(bitmap, bits_past_the_end_are_ignored)
{
	__u64 last = self->s.pages / 64;

	EXPECT_EQ(0, touch_or(&self->s.bitmap[last], ~0ULL << (self->s.pages % 64)));
	EXPECT_EQ(0, touch_or(&self->s.bitmap[bitmap_bytes(self->s.pages) / 8 - 1], ~0ULL));
	EXPECT_MARK(self->s.pages, &self->s, KDP_STATE_PRESENT, 0, self->s.pages);
	EXPECT_MARK(self->s.pages, &self->s, KDP_STATE_ABSENT, 0, self->s.pages);
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
	EXPECT_EQ(0, atomic_load(&self->s.bitmap[0]));
}

TEST_F(bitmap, is_shared_by_all_processes)
{
	pid_t child;

	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 1, 1);
	child = fork();
	if (!child) {
		atomic_ullong *own = map(self->s.fd, PAGE, PROT_READ | PROT_WRITE,
					 KDP_BITMAP_OFFSET);

		if (own == MAP_FAILED || !bit_get(own, 1) || !bit_get(self->s.bitmap, 1))
			_exit(1);
		bit_set(own, 2);
		bit_set(self->s.bitmap, 3);
		_exit(0);
	}
	EXPECT_EQ(0, child_status(child));
	EXPECT_EQ(0xe, atomic_load(&self->s.bitmap[0]));
}

/* Several threads set neighbouring bits: no bit is lost, by hand or by the module. */
static void *set_odd_bits(void *arg)
{
	struct slot *s = arg;

	for (__u64 page = 1; page < 8192; page += 2)
		bit_set(s->bitmap, page);
	return NULL;
}

TEST_F(bitmap, concurrent_sets_are_not_lost)
{
	pthread_t thread;
	__u64 lost = 0;

	ASSERT_EQ(0, pthread_create(&thread, NULL, set_odd_bits, &self->s));
	for (__u64 page = 0; page < 8192; page += 2) {
		EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, page, 1).changed);
	}
	ASSERT_EQ(0, pthread_join(thread, NULL));
	for (__u64 page = 0; page < 8192; page++)
		lost += !bit_get(self->s.bitmap, page);
	EXPECT_EQ(0, lost);
}
