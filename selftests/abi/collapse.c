// SPDX-License-Identifier: GPL-2.0
/* KDP_COLLAPSE as a call; what becomes of the mappings is tested with guests elsewhere. */
#include "test.h"

#define BLOCK	512
#define PAGES	(2 * BLOCK)

FIXTURE(abi) {
	int vm;
	struct slot s;
	struct kdp_collapse got;
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
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

/* EXPECT that the call says so. */
#define EXPECT_COLLAPSE(first, count, collapsed_, incomplete_, small_, missing_) do {		\
	ASSERT_EQ(0, kdp_collapse(self->vm, 1, (first), (count), &self->got));			\
	EXPECT_EQ((collapsed_), self->got.collapsed);						\
	EXPECT_EQ((incomplete_), self->got.incomplete);						\
	EXPECT_EQ((small_), self->got.small);							\
	EXPECT_EQ((__u64)(missing_), self->got.missing);					\
} while (0)

/* A mapping that a seal keeps from being written stays so when it is mapped anew. */
TEST_F(abi, collapse_keeps_a_seal)
{
	struct slot *s = &self->s;
	unsigned char *ro, val;

	ASSERT_EQ(0, fcntl(s->memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	ro = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, s->fd, 0);
	ASSERT_NE(MAP_FAILED, ro);
	EXPECT_MARK(BLOCK - 1, s, KDP_STATE_PRESENT, 0, BLOCK - 1);
	EXPECT_EQ(0, touch_read(ro, &val));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, BLOCK - 1, 1);
	EXPECT_EQ(0, touch_read(ro + (BLOCK - 1) * PAGE, &val));
	EXPECT_EQ(0, kdp_collapse(self->vm, 1, 0, BLOCK, &self->got));
	EXPECT_EQ(variant->hugetlb ? BLOCK : 0, self->got.collapsed);
	for (int page = 0; page < BLOCK; page++)
		EXPECT_EQ(0, touch_read(ro + page * PAGE, &val));
	EXPECT_EQ(-1, mprotect(ro, PAGES * PAGE, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EACCES, errno);
}

TEST_F(abi, collapse_says_what_cannot_be)
{
	struct slot *s = &self->s;

	if (!variant->hugetlb) {
		EXPECT_COLLAPSE(0, PAGES, 0, 0, PAGES, ~0ULL);
		EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
		EXPECT_COLLAPSE(3, 700, 0, 0, 700, ~0ULL);
		return;
	}
	EXPECT_COLLAPSE(0, PAGES, 0, PAGES, 0, 0);
	EXPECT_MARK(BLOCK, s, KDP_STATE_PRESENT, 0, BLOCK);
	EXPECT_COLLAPSE(0, PAGES, BLOCK, BLOCK, 0, BLOCK);
	EXPECT_MARK(100, s, KDP_STATE_PRESENT, BLOCK, 100);
	EXPECT_COLLAPSE(0, PAGES, BLOCK, BLOCK, 0, BLOCK + 100);
	/* A page that is zero is not present yet. */
	EXPECT_MARK(BLOCK - 100, s, KDP_STATE_ZERO, BLOCK + 100, BLOCK - 100);
	EXPECT_COLLAPSE(BLOCK, BLOCK, 0, BLOCK, 0, BLOCK + 100);
	EXPECT_MARK(BLOCK - 100, s, KDP_STATE_PRESENT, BLOCK + 100, BLOCK - 100);
	EXPECT_COLLAPSE(0, PAGES, PAGES, 0, 0, ~0ULL);
	/* Parts of blocks. */
	EXPECT_COLLAPSE(1, PAGES - 1, BLOCK, 0, BLOCK - 1, ~0ULL);
	EXPECT_COLLAPSE(1, PAGES - 2, 0, 0, PAGES - 2, ~0ULL);
	EXPECT_COLLAPSE(BLOCK - 1, 1, 0, 0, 1, ~0ULL);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_ON_PRESENT));
	EXPECT_COLLAPSE(0, PAGES, PAGES, 0, 0, ~0ULL);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 7, 1);
	EXPECT_COLLAPSE(0, PAGES, BLOCK, BLOCK, 0, 7);
	EXPECT_EQ(0, kdp_paging(s->vm, s->id, KDP_PAGING_OFF));
	EXPECT_COLLAPSE(0, PAGES, PAGES, 0, 0, ~0ULL);
}

TEST_F(abi, collapse_bad_range_is_einval)
{
	static const struct { __u64 first, count; } bad[] = {
		{ 0, 0 }, { 0, PAGES + 1 }, { PAGES, 1 }, { PAGES - 1, 2 }, { 1, ~0ULL },
		{ ~0ULL, 1 }, { ~0ULL, 2 }, { 1ULL << 63, 1ULL << 63 }, { PAGES, 0 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(EINVAL, kdp_collapse(self->vm, 1, bad[i].first, bad[i].count, &self->got))
			TH_LOG("%llu, %llu", bad[i].first, bad[i].count);
	}
}

/* Bytes and states stay as they are. */
TEST_F(abi, collapse_changes_nothing_that_can_be_read)
{
	struct slot *s = &self->s;

	for (int page = 0; page < PAGES; page++)
		s->alias[page * PAGE] = page * 5 + 1;
	EXPECT_MARK(PAGES - 1, s, KDP_STATE_PRESENT, 0, PAGES - 1);
	for (int round = 0; round < 3; round++) {
		for (int page = 0; page < PAGES - 1; page += 3)
			EXPECT_BYTE((unsigned char)(page * 5 + 1), s->guest + page * PAGE);
		EXPECT_EQ(0, kdp_collapse(self->vm, 1, 0, PAGES, &self->got));
	}
	EXPECT_EQ(0, bit_get(s->bitmap, PAGES - 1));
	EXPECT_EQ(0, touch_write(s->guest + 8, 0x77));
	EXPECT_EQ(0, kdp_collapse(self->vm, 1, 0, PAGES, &self->got));
	EXPECT_EQ(0x77, s->alias[8]);
	EXPECT_FALSE(event_pending(self->vm, 0));
}
