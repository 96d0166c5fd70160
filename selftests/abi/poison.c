// SPDX-License-Identifier: GPL-2.0
/* KDP_POISON and KDP_POISON_LIST as calls; what a touch gets is tested with guests elsewhere. */
#include "test.h"

#define PAGES	1000
#define ROOM	8

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

#define EXPECT_DONE(want_changed, call_) do {						\
	struct marked m_ = (call_);							\
	EXPECT_EQ(0, m_.err);								\
	EXPECT_EQ(1, m_.done);								\
	EXPECT_EQ((__u64)(want_changed), m_.changed);					\
} while (0)

static int list(int vm, struct kdp_poison_list *arg, struct kdp_poisoned *out, __u32 room,
		__u64 first)
{
	*arg = KDP_ARG(kdp_poison_list, .slot_id = 1, .count = room, .first = first,
		       .poisoned = (uintptr_t)out);
	return kdp_ioctl(vm, KDP_POISON_LIST, arg);
}

/* How many pages are poisoned, by the list. */
static __u64 poisoned(int vm)
{
	struct kdp_poisoned out[ROOM];
	struct kdp_poison_list arg = { 0 };
	__u64 pages = 0;

	do {
		if (list(vm, &arg, out, ROOM, arg.first))
			return ~0ULL;
		for (__u32 i = 0; i < arg.count; i++)
			pages += out[i].count;
	} while (arg.first < PAGES);
	return pages;
}

TEST_F(abi, poison_counts_what_changed)
{
	const struct kdp_range ranges[] = { { 10, 10 }, { 15, 10 }, { 10, 10 }, { 999, 1 } };
	struct marked m;

	EXPECT_DONE(5, kdp_poison(self->vm, 1, 100, 5));
	EXPECT_DONE(0, kdp_poison(self->vm, 1, 100, 5));
	EXPECT_DONE(3, kdp_poison(self->vm, 1, 103, 5));
	m = kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_INHERITED, ranges, 4);
	EXPECT_EQ(0, m.err);
	EXPECT_EQ(4, m.done);
	EXPECT_EQ(16, m.changed);
	EXPECT_EQ(24, poisoned(self->vm));
	EXPECT_DONE(2, kdp_heal(self->vm, 1, 90, 12));
	EXPECT_DONE(0, kdp_heal(self->vm, 1, 90, 12));
	EXPECT_DONE(22, kdp_heal(self->vm, 1, 0, PAGES));
	EXPECT_EQ(0, poisoned(self->vm));
}

TEST_F(abi, poison_is_beside_the_other_state)
{
	EXPECT_MARK(10, &self->s, KDP_STATE_PRESENT, 0, 10);
	EXPECT_DONE(20, kdp_poison(self->vm, 1, 0, 20));
	EXPECT_EQ(1, bit_get(self->s.bitmap, 5));
	EXPECT_MARK(2, &self->s, KDP_STATE_ABSENT, 4, 2);
	EXPECT_MARK(2, &self->s, KDP_STATE_PRESENT, 12, 2);
	EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 15, 1);
	EXPECT_EQ(20, poisoned(self->vm));
	/* With demand paging off, and on again. */
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_EQ(20, poisoned(self->vm));
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
	EXPECT_EQ(20, poisoned(self->vm));
	EXPECT_DONE(20, kdp_heal(self->vm, 1, 0, PAGES));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 5));
}

TEST_F(abi, poison_bad_cause_is_einval)
{
	struct kdp_range range = { 0, 1 };

	EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, 0, 0, &range, 1).err);
	EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_HARDWARE, &range, 1).err);
	EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, KDP_POISON_HEAL, KDP_CAUSE_EMULATED,
					    &range, 1).err);
	EXPECT_EQ(EOPNOTSUPP, kdp_poison_ranges(self->vm, 1, 0, 4, &range, 1).err);
	EXPECT_EQ(EOPNOTSUPP, kdp_poison_ranges(self->vm, 1, 0, ~0U, &range, 1).err);
	EXPECT_EQ(0, poisoned(self->vm));
}

TEST_F(abi, poison_bad_range_is_einval)
{
	const struct kdp_range bad[] = {
		{ 0, 0 }, { PAGES, 1 }, { 0, PAGES + 1 }, { PAGES - 1, 2 }, { ~0ULL, 1 },
		{ 1, ~0ULL }, { 1ULL << 63, 1ULL << 63 }, { 1ULL << 52, 1 },
	};

	EXPECT_DONE(3, kdp_poison(self->vm, 1, 500, 3));
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct kdp_range ranges[] = { { 0, 20 }, bad[i] };

		EXPECT_EQ(EINVAL, kdp_poison(self->vm, 1, bad[i].first, bad[i].count).err);
		EXPECT_EQ(EINVAL, kdp_heal(self->vm, 1, bad[i].first, bad[i].count).err);
		/* All are checked before one is done. */
		EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_EMULATED, ranges,
						    2).err);
	}
	EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_EMULATED, bad, 0).err);
	EXPECT_EQ(EINVAL, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_EMULATED, bad,
					    KDP_MAX_RANGES + 1).err);
	EXPECT_EQ(3, poisoned(self->vm));
}

TEST_F(abi, poison_ranges_unmapped_is_efault)
{
	EXPECT_EQ(EFAULT, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_EMULATED, NULL, 1).err);
	EXPECT_EQ(EFAULT, kdp_poison_ranges(self->vm, 1, KDP_POISON_HEAL, 0, (void *)-1UL,
					    1).err);
}

TEST_F(abi, poison_unknown_slot_is_enoent)
{
	struct kdp_poison_list arg;
	struct kdp_poisoned out;

	EXPECT_EQ(ENOENT, kdp_poison(self->vm, 2, 0, 1).err);
	EXPECT_EQ(ENOENT, kdp_heal(self->vm, 2, 0, 1).err);
	EXPECT_EQ(0, kdp_remove(self->vm, 1));
	EXPECT_EQ(ENOENT, list(self->vm, &arg, &out, 1, 0));
}

TEST_F(abi, poison_list_goes_on)
{
	struct kdp_poisoned out[ROOM];
	struct kdp_poison_list arg;
	struct kdp_range range = { 400, 2 };

	/* None. */
	ASSERT_EQ(0, list(self->vm, &arg, out, ROOM, 0));
	EXPECT_EQ(0, arg.count);
	EXPECT_EQ(PAGES, arg.first);
	for (__u64 page = 0; page < 20; page++)
		EXPECT_DONE(1, kdp_poison(self->vm, 1, page * 3, 1));
	EXPECT_DONE(4, kdp_poison(self->vm, 1, 398, 4));
	EXPECT_DONE(2, kdp_heal(self->vm, 1, 400, 2));
	EXPECT_EQ(0, kdp_poison_ranges(self->vm, 1, 0, KDP_CAUSE_INHERITED, &range, 1).err);
	EXPECT_DONE(1, kdp_poison(self->vm, 1, PAGES - 1, 1));
	ASSERT_EQ(0, list(self->vm, &arg, out, ROOM, 0));
	EXPECT_EQ(ROOM, arg.count);
	EXPECT_EQ(22, arg.first);
	EXPECT_EQ(21, out[ROOM - 1].first);
	ASSERT_EQ(0, list(self->vm, &arg, out, ROOM, 57));
	ASSERT_EQ(4, arg.count);
	EXPECT_EQ(PAGES, arg.first);
	EXPECT_EQ(57, out[0].first);
	/* Side by side, of two causes. */
	EXPECT_EQ(398, out[1].first);
	EXPECT_EQ(2, out[1].count);
	EXPECT_EQ(KDP_CAUSE_EMULATED, out[1].cause);
	EXPECT_EQ(400, out[2].first);
	EXPECT_EQ(2, out[2].count);
	EXPECT_EQ(KDP_CAUSE_INHERITED, out[2].cause);
	EXPECT_EQ(0, out[2].__reserved);
	EXPECT_EQ(PAGES - 1, out[3].first);
	/* From within a run. */
	ASSERT_EQ(0, list(self->vm, &arg, out, 1, 399));
	EXPECT_EQ(1, out[0].count);
	EXPECT_EQ(400, arg.first);
}

TEST_F(abi, poison_list_bad_room_is_einval)
{
	struct kdp_poison_list arg;
	struct kdp_poisoned out;

	EXPECT_EQ(EINVAL, list(self->vm, &arg, &out, 0, 0));
	EXPECT_EQ(EINVAL, list(self->vm, &arg, &out, KDP_MAX_RANGES + 1, 0));
	EXPECT_EQ(EINVAL, list(self->vm, &arg, &out, 1, PAGES + 1));
	EXPECT_EQ(0, list(self->vm, &arg, &out, 1, PAGES));
	EXPECT_EQ(0, arg.count);
	/* Nothing to write, nothing fails. */
	EXPECT_EQ(0, list(self->vm, &arg, NULL, 1, 0));
	EXPECT_DONE(1, kdp_poison(self->vm, 1, 7, 1));
	EXPECT_EQ(EFAULT, list(self->vm, &arg, NULL, 1, 0));
	EXPECT_EQ(0, list(self->vm, &arg, &out, 1, 0));
}
