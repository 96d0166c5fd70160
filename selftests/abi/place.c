// SPDX-License-Identifier: GPL-2.0
/* KDP_PLACE: absent pages get their bytes, once. */
#include "test.h"

#define PAGES	1024

FIXTURE(abi_place) {
	int vm;
	struct slot s;
	unsigned char *data;
};

FIXTURE_VARIANT(abi_place) {
	bool hugetlb;
};

FIXTURE_VARIANT_ADD(abi_place, shmem) { .hugetlb = false };
FIXTURE_VARIANT_ADD(abi_place, hugetlb) { .hugetlb = true };

FIXTURE_SETUP(abi_place)
{
	if (variant->hugetlb && !hugetlb_reserve(2))
		SKIP(return, "no free huge pages");
	self->vm = vm_open(_metadata);
	self->s = slot_on(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING, variant->hugetlb);
	self->data = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1, 0);
	ASSERT_NE(MAP_FAILED, self->data);
}

FIXTURE_TEARDOWN(abi_place)
{
	close(self->vm);
}

static int place(int vm, __u64 first, __u64 count, const void *data, void *results,
		 struct kdp_place *arg)
{
	*arg = KDP_ARG(kdp_place, .slot_id = 1, .first = first, .count = count,
		       .data = (uintptr_t)data, .results = (uintptr_t)results,
		       .done = 77, .placed = 77);
	return kdp_ioctl(vm, KDP_PLACE, arg);
}

#define EXPECT_PLACE(err_, done_, placed_, first_, count_, data_, results_) do {	\
	struct kdp_place a_;								\
	EXPECT_EQ(err_, place(self->vm, first_, count_, data_, results_, &a_));		\
	EXPECT_EQ((__u64)(done_), a_.done);						\
	EXPECT_EQ((__u64)(placed_), a_.placed);						\
} while (0)

TEST_F(abi_place, absent_pages_get_their_bytes_once)
{
	unsigned char results[6];

	memset(self->data, 1, 3 * PAGE);
	EXPECT_PLACE(0, 3, 3, 10, 3, self->data, NULL);
	EXPECT_BYTE(1, self->s.guest + 12 * PAGE + 4095);
	self->s.guest[11 * PAGE] = 9;
	memset(self->data, 2, 6 * PAGE);
	memset(results, 0xff, sizeof(results));
	EXPECT_PLACE(0, 6, 3, 9, 6, self->data, results);
	EXPECT_EQ(0, memcmp(results, ((unsigned char[]){ KDP_PLACED_NOW, KDP_PLACED_PRESENT,
		KDP_PLACED_PRESENT, KDP_PLACED_PRESENT, KDP_PLACED_NOW, KDP_PLACED_NOW }), 6));
	EXPECT_BYTE(2, self->s.guest + 9 * PAGE);
	EXPECT_BYTE(9, self->s.guest + 11 * PAGE);
	EXPECT_BYTE(1, self->s.guest + 12 * PAGE);
	EXPECT_BYTE(2, self->s.guest + 14 * PAGE);
	for (int page = 9; page < 15; page++)
		EXPECT_EQ(1, bit_get(self->s.bitmap, page));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 15));
	EXPECT_MARK(1, &self->s, KDP_STATE_ABSENT, 10, 1);
	EXPECT_PLACE(0, 1, 1, 10, 1, self->data, NULL);
	EXPECT_BYTE(2, self->s.guest + 10 * PAGE);
}

TEST_F(abi_place, zero_page_is_filled_unless_it_was_touched)
{
	memset(self->data, 3, 2 * PAGE);
	EXPECT_MARK(2, &self->s, KDP_STATE_ZERO, 20, 2);
	EXPECT_BYTE(0, self->s.guest + 20 * PAGE);
	EXPECT_PLACE(0, 2, 1, 20, 2, self->data, NULL);
	EXPECT_BYTE(0, self->s.guest + 20 * PAGE);
	EXPECT_BYTE(3, self->s.guest + 21 * PAGE);
	/* It is not zero any more when demand paging goes off. */
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_BYTE(3, self->s.guest + 21 * PAGE);
}

TEST_F(abi_place, poisoned_page_is_left_alone)
{
	unsigned char results[2] = { 0xff, 0xff };

	memset(self->data, 4, 2 * PAGE);
	EXPECT_EQ(0, kdp_poison(self->vm, 1, 30, 1).err);
	EXPECT_PLACE(0, 2, 1, 30, 2, self->data, results);
	EXPECT_EQ(KDP_PLACED_LOST, results[0]);
	EXPECT_EQ(KDP_PLACED_NOW, results[1]);
	EXPECT_EQ(0, bit_get(self->s.bitmap, 30));
	EXPECT_EQ(0, kdp_heal(self->vm, 1, 30, 1).err);
	EXPECT_PLACE(0, 1, 1, 30, 1, self->data, NULL);
	EXPECT_BYTE(4, self->s.guest + 30 * PAGE);
}

TEST_F(abi_place, waiter_goes_on)
{
	struct toucher t = { 0 };

	wait_begins(_metadata, &self->s, &t, 40, TOUCH_READ);
	memset(self->data, 5, PAGE);
	EXPECT_PLACE(0, 1, 1, 40, 1, self->data, NULL);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(5, t.val);
	EXPECT_FALSE(event_pending(self->vm, 50));
}

TEST_F(abi_place, wrong_range_is_einval)
{
	const struct kdp_range ranges[] = {
		{ 0, 0 }, { PAGES, 1 }, { PAGES - 1, 2 }, { 0, PAGES + 1 }, { ~0ULL, 1 },
		{ 1, ~0ULL }, { 0, 1ULL << 52 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(ranges); i++)
		EXPECT_PLACE(EINVAL, 0, 0, ranges[i].first, ranges[i].count, self->data, NULL);
}

TEST_F(abi_place, paging_off_is_enxio)
{
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_PLACE(ENXIO, 0, 0, 0, 1, self->data, NULL);
}

/* What can be read is placed. */
TEST_F(abi_place, bad_data_is_efault)
{
	unsigned char results[4];

	memset(self->data, 6, 2 * PAGE);
	ASSERT_EQ(0, munmap(self->data + 2 * PAGE, PAGE));
	EXPECT_PLACE(EFAULT, 2, 2, 50, 3, self->data, results);
	EXPECT_BYTE(6, self->s.guest + 51 * PAGE);
	EXPECT_EQ(0, bit_get(self->s.bitmap, 52));
	EXPECT_PLACE(EFAULT, 0, 0, 53, 1, NULL, NULL);
	/* The result of the first cannot be told, and it is done. */
	EXPECT_PLACE(EFAULT, 1, 1, 53, 2, self->data, self->data + 2 * PAGE);
	EXPECT_EQ(1, bit_get(self->s.bitmap, 53));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 54));
}

/* The bytes may be guest memory that is to be fetched first. */
TEST_F(abi_place, data_in_absent_page)
{
	struct slot other = slot_new(_metadata, self->vm, 2, 8, KDP_MEMSLOT_PAGING);
	struct kdp_place arg;
	struct kdp_event ev;
	pid_t child = fork();

	if (!child)
		_exit(place(self->vm, 60, 1, other.guest, NULL, &arg));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(2, ev.slot_id);
	memset(other.alias, 8, PAGE);
	EXPECT_MARK(1, &other, KDP_STATE_PRESENT, 0, 1);
	EXPECT_EQ(0, child_status(child));
	EXPECT_BYTE(8, self->s.guest + 60 * PAGE);
}
