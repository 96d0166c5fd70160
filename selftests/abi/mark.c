// SPDX-License-Identifier: GPL-2.0
/* KDP_MARK: arguments, `done` and `changed`, and all transitions as the bitmap shows them. */
#include "test.h"

#define PAGES	1000	/* neither a multiple of 64 nor of 512 */

FIXTURE(abi) {
	int vm;
	struct slot s;
};

FIXTURE_SETUP(abi)
{
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

static __u64 bits_set(struct slot *s)
{
	__u64 n = 0;

	for (__u64 page = 0; page < s->pages; page++)
		n += bit_get(s->bitmap, page);
	return n;
}

/* EXPECT this error, and that no page changed. */
#define EXPECT_UNMARKED(want, expr) do {						\
	__u64 before_ = bits_set(&self->s);						\
	EXPECT_EQ((want), (expr).err);							\
	EXPECT_EQ(before_, bits_set(&self->s));						\
} while (0)

TEST_F(abi, mark_ranges_at_odd_places)
{
	const struct kdp_range odd[] = {
		{ 0, 1 }, { 63, 2 }, { 1, 62 }, { 64, 64 }, { 127, 130 }, { 511, 2 }, { PAGES - 1, 1 },
		{ 0, PAGES }, { 1, PAGES - 1 }, { 0, PAGES - 1 }, { 320, 193 }, { PAGES - 41, 41 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(odd); i++) {
		EXPECT_MARK(odd[i].count, &self->s, KDP_STATE_PRESENT, odd[i].first, odd[i].count);
		for (__u64 page = 0; page < PAGES; page++) {
			bool want = page >= odd[i].first && page < odd[i].first + odd[i].count;

			EXPECT_EQ(want, bit_get(self->s.bitmap, page))
				TH_LOG("range %zu, page %llu", i, page);
		}
		EXPECT_MARK(0, &self->s, KDP_STATE_PRESENT, odd[i].first, odd[i].count);
		EXPECT_MARK(odd[i].count, &self->s, KDP_STATE_ABSENT, odd[i].first, odd[i].count);
		EXPECT_EQ(0, bits_set(&self->s));
		EXPECT_MARK(odd[i].count, &self->s, KDP_STATE_ZERO, odd[i].first, odd[i].count);
		EXPECT_EQ(0, bits_set(&self->s));
		EXPECT_MARK(0, &self->s, KDP_STATE_ZERO, odd[i].first, odd[i].count);
		EXPECT_MARK(PAGES, &self->s, KDP_STATE_PRESENT, 0, PAGES);
		EXPECT_MARK(PAGES, &self->s, KDP_STATE_ABSENT, 0, PAGES);
	}
}

TEST_F(abi, mark_transitions)
{
	/* from, to, pages changed of one */
	const __u32 table[][3] = {
		{ KDP_STATE_ABSENT, KDP_STATE_ABSENT, 0 },
		{ KDP_STATE_ABSENT, KDP_STATE_PRESENT, 1 },
		{ KDP_STATE_ABSENT, KDP_STATE_ZERO, 1 },
		{ KDP_STATE_PRESENT, KDP_STATE_ABSENT, 1 },
		{ KDP_STATE_PRESENT, KDP_STATE_PRESENT, 0 },
		{ KDP_STATE_PRESENT, KDP_STATE_ZERO, 0 },
		{ KDP_STATE_ZERO, KDP_STATE_ABSENT, 1 },
		{ KDP_STATE_ZERO, KDP_STATE_PRESENT, 1 },
		{ KDP_STATE_ZERO, KDP_STATE_ZERO, 0 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
		__u32 from = table[i][0], to = table[i][1];
		/* A page that is present does not become zero. */
		__u32 end = from == KDP_STATE_PRESENT && to == KDP_STATE_ZERO ? from : to;

		EXPECT_MARK(from == KDP_STATE_ABSENT ? 0 : 1, &self->s, from, 65, 1);
		EXPECT_MARK(table[i][2], &self->s, to, 65, 1);
		EXPECT_EQ(end == KDP_STATE_PRESENT, bit_get(self->s.bitmap, 65))
			TH_LOG("from %u to %u", from, to);
		/* Zero and absent have the same bit; marking it absent tells them apart. */
		EXPECT_MARK(end == KDP_STATE_ABSENT ? 0 : 1, &self->s, KDP_STATE_ABSENT, 65, 1);
	}
}

TEST_F(abi, mark_mixed_range_counts_what_changed)
{
	EXPECT_MARK(10, &self->s, KDP_STATE_PRESENT, 100, 10);
	EXPECT_MARK(10, &self->s, KDP_STATE_ZERO, 110, 10);
	/* 90-99 absent, 100-109 present, 110-119 zero, 120-129 absent */
	EXPECT_MARK(20, &self->s, KDP_STATE_ZERO, 90, 40);
	EXPECT_EQ(10, bits_set(&self->s));
	EXPECT_MARK(30, &self->s, KDP_STATE_PRESENT, 90, 40);
	EXPECT_EQ(40, bits_set(&self->s));
	EXPECT_MARK(5, &self->s, KDP_STATE_ABSENT, 125, 100);
	EXPECT_EQ(35, bits_set(&self->s));
}

TEST_F(abi, mark_ranges_may_overlap)
{
	const struct kdp_range ranges[] = { { 10, 10 }, { 15, 10 }, { 10, 10 }, { 0, 100 }, { 50, 1 } };
	struct marked m = kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, ranges, 5);

	EXPECT_EQ(0, m.err);
	EXPECT_EQ(5, m.done);
	EXPECT_EQ(100, m.changed);
	EXPECT_EQ(100, bits_set(&self->s));
}

TEST_F(abi, mark_max_ranges)
{
	struct kdp_range *ranges = calloc(KDP_MAX_RANGES + 1, sizeof(*ranges));
	struct marked m;

	ASSERT_NE(NULL, ranges);
	for (__u32 i = 0; i < KDP_MAX_RANGES + 1; i++)
		ranges[i] = (struct kdp_range){ (i * 7ULL) % PAGES, 1 };
	EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, ranges,
						KDP_MAX_RANGES + 1));
	EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, ranges, 1U << 31));
	EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, ranges, ~0U));
	m = kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, ranges, KDP_MAX_RANGES);
	EXPECT_EQ(0, m.err);
	EXPECT_EQ(KDP_MAX_RANGES, m.done);
	EXPECT_EQ(PAGES, m.changed);
}

TEST_F(abi, mark_no_ranges_is_einval)
{
	struct kdp_range range = { 0, 1 };

	EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, &range, 0));
	EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, NULL, 0));
}

TEST_F(abi, mark_bad_range_is_einval)
{
	const struct kdp_range bad[] = {
		{ 0, 0 }, { 5, 0 }, { PAGES, 0 }, { PAGES, 1 }, { 0, PAGES + 1 }, { PAGES - 1, 2 },
		{ 1, PAGES }, { PAGES + 1, 1 }, { ~0ULL, 1 }, { ~0ULL, 2 }, { 1, ~0ULL },
		{ ~0ULL - 1, 3 }, { 0, ~0ULL }, { 1ULL << 63, 1ULL << 63 }, { 2, ~0ULL - 1 },
		{ 1ULL << 52, 1 }, { 0, 1ULL << 52 }, { 1ULL << 32, 1 }, { 0, 1ULL << 32 },
	};
	const __u32 states[] = { KDP_STATE_PRESENT, KDP_STATE_ABSENT, KDP_STATE_ZERO };

	EXPECT_MARK(7, &self->s, KDP_STATE_PRESENT, 3, 7);
	for (size_t s = 0; s < ARRAY_SIZE(states); s++)
		for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
			/* Alone, and after good ranges: all are checked before one is done. */
			struct kdp_range ranges[3] = { { 0, 20 }, { 40, 5 }, bad[i] };

			EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, states[s], &bad[i], 1));
			EXPECT_UNMARKED(EINVAL, kdp_mark_ranges(self->vm, 1, states[s], ranges, 3));
		}
	/* No page became zero either. */
	EXPECT_MARK(7, &self->s, KDP_STATE_ABSENT, 0, PAGES);
}

TEST_F(abi, mark_ranges_unmapped_is_efault)
{
	unsigned char *two = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kdp_range *edge = (struct kdp_range *)(two + PAGE) - 1;

	ASSERT_NE(MAP_FAILED, two);
	ASSERT_EQ(0, mprotect(two + PAGE, PAGE, PROT_NONE));
	*edge = (struct kdp_range){ 0, 1 };
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, NULL, 1));
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT,
						(void *)(two + PAGE), 1));
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT,
						(void *)0xffff888000000000UL, 1));
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT,
						(void *)0x8000000000000000UL, KDP_MAX_RANGES));
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, (void *)-1UL, 1));
	/* The first range is there, the second is not: nothing is done. */
	EXPECT_UNMARKED(EFAULT, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, edge, 2));
	EXPECT_EQ(0, kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT, edge, 1).err);
}

TEST_F(abi, mark_ranges_in_absent_page)
{
	struct kdp_range *ranges = (struct kdp_range *)self->s.alias;
	struct kdp_event ev;
	pid_t child;

	/* The list of ranges lies in guest memory that has to be fetched first. */
	ranges[0] = (struct kdp_range){ 10, 10 };
	ranges[1] = (struct kdp_range){ 15, 10 };
	child = fork();
	if (!child) {
		struct marked m = kdp_mark_ranges(self->vm, 1, KDP_STATE_PRESENT,
						  (struct kdp_range *)self->s.guest, 2);

		_exit(m.err ?: m.done != 2 || m.changed != 15);
	}
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(0, ev.page);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	EXPECT_EQ(0, child_status(child));
	EXPECT_EQ(16, bits_set(&self->s));
}

TEST_F(abi, mark_with_paging_off)
{
	ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_EQ(ENXIO, kdp_mark(self->vm, 1, KDP_STATE_ABSENT, 0, 1).err);
	EXPECT_EQ(ENXIO, kdp_mark(self->vm, 1, KDP_STATE_ZERO, 0, 1).err);
	EXPECT_MARK(0, &self->s, KDP_STATE_PRESENT, 0, PAGES);
	/* A bad range is bad all the same. */
	EXPECT_EQ(EINVAL, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, 0, PAGES + 1).err);
	EXPECT_BYTE(0, self->s.guest);
}

TEST_F(abi, mark_done_and_changed_are_outputs)
{
	struct kdp_range range = { 0, 4 };
	struct kdp_mark arg = KDP_ARG(kdp_mark, .slot_id = 1, .state = KDP_STATE_PRESENT,
				      .ranges = (uintptr_t)&range, .nr_ranges = 1,
				      .done = 0xffffffff, .changed = ~0ULL);

	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_MARK, &arg));
	EXPECT_EQ(1, arg.done);
	EXPECT_EQ(4, arg.changed);
	/* What went in comes out. */
	EXPECT_EQ(sizeof(arg), arg.size);
	EXPECT_EQ(1, arg.slot_id);
	EXPECT_EQ(KDP_STATE_PRESENT, arg.state);
	EXPECT_EQ((uintptr_t)&range, arg.ranges);
	EXPECT_EQ(1, arg.nr_ranges);
	EXPECT_EQ(0, range.first);
	EXPECT_EQ(4, range.count);
}

TEST_F(abi, mark_is_per_memslot)
{
	struct slot other = slot_new(_metadata, self->vm, 2, PAGES, KDP_MEMSLOT_PAGING);

	EXPECT_MARK(PAGES, &self->s, KDP_STATE_PRESENT, 0, PAGES);
	EXPECT_EQ(0, bits_set(&other));
	EXPECT_MARK(1, &other, KDP_STATE_PRESENT, 4, 1);
	EXPECT_MARK(PAGES, &self->s, KDP_STATE_ABSENT, 0, PAGES);
	EXPECT_EQ(1, bits_set(&other));
}

TEST_F(abi, mark_dies_on_a_fatal_signal)
{
	const __u64 pages = 1ULL << 29;	/* 2 TiB; its bitmap has 64 MiB */
	struct kdp_memslot_create arg = good_create(_metadata, 9, pages);
	long long end;
	pid_t child;

	arg.base_gfn = 1ULL << 39;
	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	child = fork();
	if (!child) {
		for (;;) {
			kdp_mark(self->vm, 9, KDP_STATE_PRESENT, 0, pages);
			kdp_mark(self->vm, 9, KDP_STATE_ABSENT, 0, pages);
		}
	}
	usleep(QUIET_MS * 1000);
	ASSERT_EQ(0, kill(child, SIGKILL));
	end = now_ms() + PATIENCE_MS;
	while (waitpid(child, NULL, WNOHANG) != child) {
		ASSERT_LT(now_ms(), end) TH_LOG("KDP_MARK of %llu pages cannot be killed", pages);
		usleep(1000);
	}
	/* The memslot still works. */
	EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, pages - 1, 1).err);
	EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, pages - 1, 1).changed);
	EXPECT_EQ(0, kdp_remove(self->vm, 9));
}
