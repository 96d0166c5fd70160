// SPDX-License-Identifier: GPL-2.0
/* KDP_REPLACE as a call: what it refuses. What it does is tested with memory errors elsewhere. */
#include "test.h"

#define BLOCK		512
#define PAGES		(2 * BLOCK)
#define HUGE_2M		(MFD_HUGETLB | MFD_HUGE_2MB)

FIXTURE(abi_replace) {
	int vm;
	struct slot s;
	struct kdp_replace arg;
};

FIXTURE_SETUP(abi_replace)
{
	if (!hugetlb_reserve(4))
		SKIP(return, "no free huge pages");
	self->vm = vm_open(_metadata);
	self->s = slot_on(_metadata, self->vm, 1, PAGES, 0, true);
	self->arg = KDP_ARG(kdp_replace, .slot_id = 1,
			    .memfd = memfd_sealed(HUGE_2M, PAGES, F_SEAL_SHRINK));
	ASSERT_LE(0, self->arg.memfd);
}

FIXTURE_TEARDOWN(abi_replace)
{
	close(self->arg.memfd);
	close(self->vm);
}

static int replace(const struct kdp_replace *with, int vm)
{
	struct kdp_replace arg = *with;
	int err = kdp_ioctl(vm, KDP_REPLACE, &arg);

	return arg.copied || arg.lost || arg.healed || arg.errors ? -1 : err;
}

TEST_F(abi_replace, healthy_is_enxio)
{
	long free = read_number(HUGETLB_SYSFS "free_hugepages");

	/* A hole, and a page. */
	EXPECT_EQ(ENXIO, replace(&self->arg, self->vm));
	memset(self->s.guest, 7, PAGES * PAGE);
	EXPECT_EQ(ENXIO, replace(&self->arg, self->vm));
	EXPECT_EQ(0, kdp_poison(self->vm, 1, 0, 1).err);
	EXPECT_EQ(ENXIO, replace(&self->arg, self->vm));
	EXPECT_BYTE(7, self->s.guest + PAGE);
	EXPECT_BYTE(7, self->s.guest + (PAGES - 1) * PAGE);
	EXPECT_EQ(free - 2, read_number(HUGETLB_SYSFS "free_hugepages"));
}

TEST_F(abi_replace, wrong_page_is_einval)
{
	const __u64 pages[] = { 1, BLOCK - 1, BLOCK + 1, PAGES, PAGES + BLOCK, ~0ULL, ~0ULL - BLOCK + 1 };

	for (size_t i = 0; i < ARRAY_SIZE(pages); i++) {
		self->arg.first = pages[i];
		EXPECT_EQ(EINVAL, replace(&self->arg, self->vm)) TH_LOG("page %#llx", pages[i]);
	}
	self->arg.first = BLOCK;
	EXPECT_EQ(ENXIO, replace(&self->arg, self->vm));
}

TEST_F(abi_replace, wrong_offset_is_einval)
{
	const __u64 bytes = PAGES * PAGE, huge = HUGE;
	const __u64 offsets[] = { 1, PAGE, huge - PAGE, bytes, bytes - PAGE, bytes + huge, ~0ULL,
				  -huge };

	for (size_t i = 0; i < ARRAY_SIZE(offsets); i++) {
		self->arg.offset = offsets[i];
		EXPECT_EQ(EINVAL, replace(&self->arg, self->vm)) TH_LOG("offset %#llx", offsets[i]);
	}
	self->arg.offset = huge;
	EXPECT_EQ(ENXIO, replace(&self->arg, self->vm));
}

TEST_F(abi_replace, wrong_size_is_einval)
{
	int gigantic = memfd_sealed(MFD_HUGETLB | MFD_HUGE_1GB, 512 * BLOCK, F_SEAL_SHRINK);

	self->arg.memfd = memfd_shmem(PAGES);
	EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
	close(self->arg.memfd);
	self->arg.memfd = gigantic;
	if (gigantic >= 0)
		EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
}

TEST_F(abi_replace, wrong_memfd)
{
	const struct {
		unsigned int seals;
		int err;
	} seals[] = {
		{ 0, EPERM },	/* it could shrink while it is used */
		{ F_SEAL_WRITE, EPERM },
		{ F_SEAL_SHRINK | F_SEAL_WRITE, EPERM },
		{ F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE, EPERM },
		{ F_SEAL_SHRINK | F_SEAL_GROW, ENXIO },
	};
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", self->arg.memfd);
	close(self->s.memfd);
	for (size_t i = 0; i < ARRAY_SIZE(seals); i++) {
		int memfd = memfd_sealed(HUGE_2M, PAGES, seals[i].seals);

		ASSERT_LE(0, memfd);
		self->arg.memfd = memfd;
		EXPECT_EQ(seals[i].err, replace(&self->arg, self->vm)) TH_LOG("seals %zu", i);
		close(memfd);
	}
	self->arg.memfd = -1;
	EXPECT_EQ(EBADF, replace(&self->arg, self->vm));
	self->arg.memfd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, self->arg.memfd);
	EXPECT_EQ(EACCES, replace(&self->arg, self->vm));
	close(self->arg.memfd);
	self->arg.memfd = self->vm;
	EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
	self->arg.memfd = -1;
}

TEST_F(abi_replace, own_memfd_is_einval)
{
	self->arg.memfd = self->s.memfd;
	EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
	self->arg.offset = HUGE;
	EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
}

TEST_F(abi_replace, shmem_memslot_is_einval)
{
	slot_new(_metadata, self->vm, 2, PAGES, 0);
	self->arg.slot_id = 2;
	EXPECT_EQ(EINVAL, replace(&self->arg, self->vm));
	self->arg.slot_id = 3;
	EXPECT_EQ(ENOENT, replace(&self->arg, self->vm));
}
