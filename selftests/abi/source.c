// SPDX-License-Identifier: GPL-2.0
/* KDP_SOURCE as a call; what becomes of the pages is tested with guests elsewhere. */
#include <sys/eventfd.h>

#include "test.h"

#define PAGES	64

FIXTURE(abi) {
	int vm;
	struct slot s;
	int file;
};

FIXTURE_SETUP(abi)
{
	unsigned char page[PAGE];

	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	self->file = memfd_shmem(PAGES);
	for (int i = 0; i < PAGES; i++) {
		memset(page, i + 1, PAGE);
		ASSERT_EQ(PAGE, pwrite(self->file, page, PAGE, i * PAGE));
	}
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
	close(self->file);
}

static int source(struct _test_data_abi *self, int fd, __u64 offset)
{
	return kdp_source(self->vm, 1, fd, offset, NULL, 0);
}

TEST_F(abi, source_reads_at_its_offset)
{
	ASSERT_EQ(0, source(self, self->file, 0));
	EXPECT_BYTE(8, self->s.guest + 7 * PAGE);
	EXPECT_EQ(1, bit_get(self->s.bitmap, 7));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 9));
	ASSERT_EQ(0, source(self, self->file, 2 * PAGE));
	EXPECT_BYTE(12, self->s.guest + 9 * PAGE);
	EXPECT_FALSE(event_pending(self->vm, 0));
	/* It does not go with the descriptor. */
	close(self->file);
	self->file = -1;
	EXPECT_BYTE(13, self->s.guest + 10 * PAGE);
}

TEST_F(abi, source_bad_fd_is_ebadf)
{
	static const int bad[] = { -2, -1000, 4000, 0x7fffffff };

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(EBADF, source(self, bad[i], 0)) TH_LOG("fd %d", bad[i]);
	}
	close(self->file);
	EXPECT_EQ(EBADF, source(self, self->file, 0));
	self->file = -1;
}

/* O_PATH opens nothing to be read. */
TEST_F(abi, source_o_path_is_ebadf)
{
	int fd = open("/proc/self/exe", O_PATH | O_CLOEXEC);

	ASSERT_LE(0, fd);
	EXPECT_EQ(EBADF, source(self, fd, 0));
	close(fd);
}

TEST_F(abi, source_write_only_is_eacces)
{
	char path[] = "/dev/shm/kdp-source-XXXXXX";
	int made = mkstemp(path), fd;

	ASSERT_LE(0, made);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	unlink(path);
	ASSERT_LE(0, fd);
	EXPECT_EQ(EACCES, source(self, fd, 0));
	EXPECT_EQ(0, source(self, made, 0));
	close(fd);
	close(made);
}

TEST_F(abi, source_other_file_is_einval)
{
	int pipes[2], fd;
	struct kdp_memslot_get get;

	EXPECT_EQ(EINVAL, source(self, self->vm, 0));
	ASSERT_EQ(0, kdp_get(self->vm, 1, KDP_GET_FD, &get));
	EXPECT_EQ(EINVAL, source(self, get.fd, 0)) TH_LOG("a memslot");
	close(get.fd);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	EXPECT_EQ(EINVAL, source(self, pipes[0], 0)) TH_LOG("a pipe");
	close(pipes[0]);
	close(pipes[1]);
	fd = open("/tmp", O_RDONLY | O_CLOEXEC);
	EXPECT_EQ(EINVAL, source(self, fd, 0)) TH_LOG("a directory");
	close(fd);
	fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	EXPECT_EQ(EINVAL, source(self, fd, 0)) TH_LOG("a character device");
	close(fd);
	fd = eventfd(0, EFD_CLOEXEC);
	EXPECT_EQ(EINVAL, source(self, fd, 0)) TH_LOG("an eventfd");
	close(fd);
}

TEST_F(abi, source_bad_offset_is_einval)
{
	static const __u64 bad[] = {
		1, 512, PAGE - 1, PAGE + 1, 1ULL << 63, ~0ULL, ~0ULL << 12,
		(1ULL << 63) - PAGE, (1ULL << 63) - PAGES * PAGE,
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(EINVAL, source(self, self->file, bad[i])) TH_LOG("offset %#llx", bad[i]);
	}
	EXPECT_EQ(0, source(self, self->file, (1ULL << 63) - (PAGES + 1) * PAGE));
	EXPECT_EQ(EINVAL, source(self, -1, PAGE));
}

TEST_F(abi, source_bad_ranges_are_einval)
{
	static const struct kdp_range bad[] = {
		{ 0, 0 }, { 0, PAGES + 1 }, { PAGES, 1 }, { PAGES - 1, 2 }, { 1, ~0ULL }, { ~0ULL, 1 },
	};
	const struct kdp_range good = { 3, 4 };

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		const struct kdp_range both[] = { good, bad[i] };

		EXPECT_EQ(EINVAL, kdp_source(self->vm, 1, self->file, 0, &bad[i], 1));
		EXPECT_EQ(EINVAL, kdp_source(self->vm, 1, self->file, 0, both, 2));
	}
	EXPECT_EQ(EINVAL, kdp_source(self->vm, 1, self->file, 0, &good, KDP_MAX_RANGES + 1));
	EXPECT_EQ(EINVAL, kdp_source(self->vm, 1, -1, 0, &good, 1)) TH_LOG("ranges of no file");
	EXPECT_EQ(EFAULT, kdp_source(self->vm, 1, self->file, 0, (void *)PAGE, 1));
	EXPECT_EQ(EFAULT, kdp_source(self->vm, 1, self->file, 0, (void *)-PAGE, 3));
	/* None of these has left a source. */
	EXPECT_EQ(ENXIO, kdp_source_add(self->vm, 1, &good, 1));
}

TEST_F(abi, source_add)
{
	const struct kdp_range first = { 0, 2 }, more[] = { { 8, 2 }, { 20, 1 } };
	struct kdp_source arg = KDP_ARG(kdp_source, .flags = KDP_SOURCE_ADD, .slot_id = 1, .fd = self->file,
					.ranges = (uintptr_t)more, .nr_ranges = 2);

	EXPECT_EQ(ENXIO, kdp_source_add(self->vm, 1, more, 2)) TH_LOG("to nothing");
	ASSERT_EQ(0, kdp_source(self->vm, 1, self->file, 0, &first, 1));
	EXPECT_EQ(EINVAL, kdp_ioctl(self->vm, KDP_SOURCE, &arg)) TH_LOG("with a file");
	EXPECT_EQ(EINVAL, kdp_source_add(self->vm, 1, more, 0)) TH_LOG("nothing");
	arg.fd = -1;
	arg.offset = PAGE;
	EXPECT_EQ(EINVAL, kdp_ioctl(self->vm, KDP_SOURCE, &arg)) TH_LOG("with an offset");
	EXPECT_EQ(0, kdp_source_add(self->vm, 1, more, 2));
	EXPECT_BYTE(2, self->s.guest + PAGE);
	EXPECT_BYTE(10, self->s.guest + 9 * PAGE);
	EXPECT_BYTE(21, self->s.guest + 20 * PAGE);
	EXPECT_FALSE(event_pending(self->vm, 0));
}

TEST_F(abi, source_without_paging_is_enxio)
{
	const struct kdp_range range = { 0, 1 };

	ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_EQ(ENXIO, source(self, self->file, 0));
	EXPECT_EQ(ENXIO, source(self, -1, 0));
	EXPECT_EQ(ENXIO, kdp_source_add(self->vm, 1, &range, 1));
	ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON_PRESENT));
	EXPECT_EQ(0, source(self, self->file, 0));
	/* What is present stays as it is. */
	self->s.alias[0] = 0x77;
	EXPECT_BYTE(0x77, self->s.guest);
}

TEST_F(abi, source_errors_are_kept_up_to_a_bound)
{
	struct kdp_event ev;
	unsigned char val;
	int told = 0;

	ASSERT_EQ(0, source(self, self->file, PAGES * PAGE));
	for (int i = 0; i < PAGES + 20; i++)
		EXPECT_EQ(SIGBUS, touch_read(self->s.guest + i % PAGES * PAGE, &val));
	while (event_pending(self->vm, 0)) {
		ev = event_read(_metadata, self->vm);
		EXPECT_EQ(KDP_EVENT_SOURCE_ERROR, ev.type);
		EXPECT_EQ(told, (int)ev.page);
		EXPECT_EQ(ENODATA, ev.error);
		EXPECT_EQ(1, ev.slot_id);
		EXPECT_EQ(slot_base(1) + ev.page, ev.gfn);
		EXPECT_EQ(KDP_ACCESS_USER, ev.access);
		EXPECT_EQ(gettid(), ev.tid);
		EXPECT_EQ(0, ev.waiters);
		EXPECT_EQ(1, ev.deliveries);
		told++;
	}
	EXPECT_EQ(64, told);
	EXPECT_EQ(0, bit_get(self->s.bitmap, 0));
}
