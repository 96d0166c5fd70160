// SPDX-License-Identifier: GPL-2.0
/* KDP_MEMFD: a file like a memfd, in folios of 2 MiB. */
#include "test.h"

#define PAGES	512
#define BYTES	(PAGES * PAGE)

FIXTURE(abi_memfd) {
	int vm;
	struct kdp_memfd arg;
};

FIXTURE_SETUP(abi_memfd)
{
	struct kdp_info info;

	self->vm = vm_open(_metadata);
	self->arg = KDP_ARG(kdp_memfd, .length = BYTES, .fd = -77);
	ASSERT_EQ(0, kdp_info(self->vm, &info));
	if (!(info.features & KDP_FEATURE_MEMFD)) {
		EXPECT_EQ(EOPNOTSUPP, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg));
		SKIP(return, "no transparent huge pages");
	}
}

FIXTURE_TEARDOWN(abi_memfd)
{
	close(self->vm);
}

TEST_F(abi_memfd, is_like_a_memfd)
{
	const int seals = F_SEAL_SHRINK | 0x20;	/* F_SEAL_EXEC */
	struct kdp_memslot_create create = good_create(_metadata, 1, PAGES);
	unsigned char byte = 0x5a;
	struct stat st;
	int fd;

	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg));
	fd = self->arg.fd;
	EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
	EXPECT_EQ(O_RDWR, fcntl(fd, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(seals, fcntl(fd, F_GET_SEALS));
	ASSERT_EQ(0, fstat(fd, &st));
	EXPECT_EQ(BYTES, st.st_size);
	EXPECT_EQ(0, st.st_blocks);
	EXPECT_EQ(0, st.st_mode & 0111);
	EXPECT_EQ(geteuid(), st.st_uid);
	EXPECT_EQ(-1, ftruncate(fd, BYTES - PAGE));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(1, pwrite(fd, &byte, 1, BYTES - 1));
	byte = 0;
	EXPECT_EQ(1, pread(fd, &byte, 1, BYTES - 1));
	EXPECT_EQ(0x5a, byte);
	EXPECT_EQ(0, fcntl(fd, F_ADD_SEALS, F_SEAL_GROW));
	EXPECT_EQ(-1, ftruncate(fd, BYTES + PAGE));
	EXPECT_EQ(EPERM, errno);
	close(create.memfd);
	create.memfd = fd;
	EXPECT_EQ(0, kdp_create(self->vm, &create));
}

/* The file stays valid when the VM is closed. */
TEST_F(abi_memfd, does_not_depend_on_the_vm)
{
	unsigned char byte = 1;

	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg));
	close(self->vm);
	self->vm = -1;
	EXPECT_EQ(1, pwrite(self->arg.fd, &byte, 1, 0));
	EXPECT_EQ(BYTES, lseek(self->arg.fd, 0, SEEK_END));
}

/* A length need not be a multiple of anything. */
TEST_F(abi_memfd, any_length)
{
	static const __u64 lengths[] = { 1, PAGE + 1, (2ULL << 20) + PAGE, 1ULL << 46, INT64_MAX };
	struct stat st;

	for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
		self->arg.length = lengths[i];
		ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg)) TH_LOG("%zu", i);
		ASSERT_EQ(0, fstat(self->arg.fd, &st));
		EXPECT_EQ(lengths[i], (__u64)st.st_size);
		close(self->arg.fd);
	}
}

TEST_F(abi_memfd, wrong_length_is_einval)
{
	static const __u64 lengths[] = { 0, 1ULL << 63, ~0ULL };
	int fds = open_fds();

	for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
		self->arg.length = lengths[i];
		EXPECT_EQ(EINVAL, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg)) TH_LOG("%zu", i);
	}
	EXPECT_EQ(fds, open_fds());
}

TEST_F(abi_memfd, no_descriptor_left_is_emfile)
{
	leave_fds(_metadata, 0);
	EXPECT_EQ(EMFILE, kdp_ioctl(self->vm, KDP_MEMFD, &self->arg));
}
