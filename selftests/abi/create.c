// SPDX-License-Identifier: GPL-2.0
/* KDP_MEMSLOT_CREATE: what it takes, and each of its errors. */
#include "test.h"

#include <sys/eventfd.h>
#include <sys/socket.h>

#define PAGES	16
#define TOP_GFN	(1ULL << 40)	/* guest physical addresses have 52 bits */

FIXTURE(abi_create) {
	int vm;
	struct kdp_memslot_create arg;
};

FIXTURE_SETUP(abi_create)
{
	self->vm = vm_open(_metadata);
	self->arg = good_create(_metadata, 1, PAGES);
}

/* Whatever failed before it, the good call must still work, once. */
FIXTURE_TEARDOWN(abi_create)
{
	struct kdp_memslot_create arg = good_create(_metadata, 0xfffffff0, PAGES);

	arg.base_gfn = 1ULL << 39;
	EXPECT_EQ(0, kdp_create(self->vm, &arg));
	close(self->vm);
}

/* EXPECT that creating fails so and leaves nothing: the VM has no memslots. */
#define EXPECT_REFUSED(want) do {							\
	struct kdp_memslot_get get_;							\
	int fds_ = open_fds();								\
	EXPECT_EQ((want), kdp_create(self->vm, &self->arg));				\
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 0, KDP_GET_NEXT, &get_));			\
	EXPECT_EQ(fds_, open_fds());							\
} while (0)

/* A fresh memfd of PAGES pages that differs from a good one in this. */
static void use_memfd(struct __test_metadata *_metadata, struct _test_data_abi_create *self,
		      unsigned int flags, unsigned int seals)
{
	close(self->arg.memfd);
	self->arg.memfd = memfd_sealed(flags, PAGES, seals);
	ASSERT_LE(0, self->arg.memfd);
}

TEST_F(abi_create, good)
{
	struct kdp_memslot_get get;

	self->arg.memfd_offset = 0;
	self->arg.fd = 12345;
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	EXPECT_EQ(FD_CLOEXEC, fcntl(self->arg.fd, F_GETFD));
	EXPECT_EQ(O_RDWR, fcntl(self->arg.fd, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(PAGES * PAGE, lseek(self->arg.fd, 0, SEEK_END));
	ASSERT_EQ(0, kdp_get(self->vm, 1, 0, &get));
	EXPECT_EQ(slot_base(1), get.base_gfn);
	EXPECT_EQ(PAGES, get.nr_pages);
	EXPECT_EQ(0, get.memfd_offset);
	EXPECT_EQ(PAGE, get.backing_page_size);
	EXPECT_EQ(KDP_PAGING_ON, get.paging);
}

TEST_F(abi_create, without_paging_flag_pages_are_present)
{
	struct kdp_memslot_get get;
	struct slot s = slot_new(_metadata, self->vm, 1, PAGES, 0);

	s.alias[5 * PAGE] = 0x55;
	ASSERT_EQ(0, kdp_get(self->vm, 1, 0, &get));
	EXPECT_EQ(KDP_PAGING_OFF, get.paging);
	EXPECT_BYTE(0x55, s.guest + 5 * PAGE);
	EXPECT_BYTE(0, s.guest + 6 * PAGE);
	EXPECT_FALSE(event_pending(self->vm, 0));
}

TEST_F(abi_create, memfd_offset)
{
	int memfd = memfd_shmem(3 * PAGES);
	struct kdp_memslot_get get;
	unsigned char *alias, *guest;

	touch_init();
	self->arg.memfd = memfd;
	self->arg.memfd_offset = 2 * PAGES * PAGE;
	self->arg.flags = 0;
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	ASSERT_EQ(0, kdp_get(self->vm, 1, 0, &get));
	EXPECT_EQ(2 * PAGES * PAGE, get.memfd_offset);
	alias = map_rw(_metadata, memfd, 3 * PAGES * PAGE, 0);
	guest = map_rw(_metadata, self->arg.fd, PAGES * PAGE, 0);
	alias[2 * PAGES * PAGE] = 0x21;
	alias[(3 * PAGES - 1) * PAGE] = 0x22;
	EXPECT_BYTE(0x21, guest);
	EXPECT_BYTE(0x22, guest + (PAGES - 1) * PAGE);
}

TEST_F(abi_create, memfd_may_be_closed)
{
	unsigned char *guest;

	touch_init();
	self->arg.flags = 0;
	ASSERT_EQ(5, pwrite(self->arg.memfd, "hello", 5, PAGE));
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	close(self->arg.memfd);
	guest = map_rw(_metadata, self->arg.fd, PAGES * PAGE, 0);
	EXPECT_BYTE('h', guest + PAGE);
}

TEST_F(abi_create, ebadf_memfd)
{
	int closed = self->arg.memfd;
	const int bad[] = { -1, -2, INT32_MIN, INT32_MAX, 100000 };

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		self->arg.memfd = bad[i];
		EXPECT_REFUSED(EBADF);
	}
	close(closed);
	self->arg.memfd = closed;
	EXPECT_REFUSED(EBADF);
}

TEST_F(abi_create, eacces_memfd_not_writable)
{
	char path[64];
	int ro;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", self->arg.memfd);
	ro = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, ro);
	self->arg.memfd = ro;
	EXPECT_REFUSED(EACCES);
}

TEST_F(abi_create, einval_not_a_memfd)
{
	struct kdp_memslot_create other;
	int fds[2];

	ASSERT_EQ(0, pipe2(fds, O_CLOEXEC));
	self->arg.memfd = fds[1];
	EXPECT_REFUSED(EINVAL);

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, fds));
	self->arg.memfd = fds[0];
	EXPECT_REFUSED(EINVAL);

	self->arg.memfd = eventfd(0, EFD_CLOEXEC);
	EXPECT_REFUSED(EINVAL);

	self->arg.memfd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	EXPECT_REFUSED(EINVAL);

	/* A regular file. */
	self->arg.memfd = open("/proc/self/comm", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->arg.memfd);
	EXPECT_REFUSED(EINVAL);

	/* The VM's own fd, and a memslot's. */
	self->arg.memfd = self->vm;
	EXPECT_REFUSED(EINVAL);
	other = good_create(_metadata, 2, PAGES);
	ASSERT_EQ(0, kdp_create(self->vm, &other));
	self->arg.memfd = other.fd;
	EXPECT_EQ(EINVAL, kdp_create(self->vm, &self->arg));
}

/* A file of tmpfs has shmem pages and no seal: it is refused for the one or for the other. */
TEST_F(abi_create, tmpfs_file_is_refused)
{
	char name[] = "/dev/shm/kdp-selftest-XXXXXX";
	int err;

	self->arg.memfd = mkostemp(name, O_CLOEXEC);
	ASSERT_LE(0, self->arg.memfd);
	unlink(name);
	ASSERT_EQ(0, ftruncate(self->arg.memfd, PAGES * PAGE));
	err = kdp_create(self->vm, &self->arg);
	EXPECT_TRUE(err == EINVAL || err == EPERM) TH_LOG("%s", strerror(err));
}

TEST_F(abi_create, eperm_seals)
{
	use_memfd(_metadata, self, 0, 0);
	EXPECT_REFUSED(EPERM);
	use_memfd(_metadata, self, 0, F_SEAL_GROW | F_SEAL_SEAL);
	EXPECT_REFUSED(EPERM);
	use_memfd(_metadata, self, 0, F_SEAL_SHRINK | F_SEAL_WRITE);
	EXPECT_REFUSED(EPERM);
	use_memfd(_metadata, self, 0, F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE);
	EXPECT_REFUSED(EPERM);
	/* One that was made without MFD_ALLOW_SEALING cannot have the seal. */
	close(self->arg.memfd);
	self->arg.memfd = memfd_create("kdp-selftest", MFD_CLOEXEC);
	ASSERT_EQ(0, ftruncate(self->arg.memfd, PAGES * PAGE));
	EXPECT_REFUSED(EPERM);
}

TEST_F(abi_create, more_seals_are_welcome)
{
	use_memfd(_metadata, self, 0, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	EXPECT_EQ(0, kdp_create(self->vm, &self->arg));
}

/* What a memslot is made of cannot be sealed against writing afterwards, or the writes are seen. */
TEST_F(abi_create, sealed_for_writing_later)
{
	unsigned char *guest;

	touch_init();
	self->arg.flags = 0;
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	guest = map_rw(_metadata, self->arg.fd, PAGES * PAGE, 0);
	ASSERT_EQ(0, touch_write(guest, 1));
	if (fcntl(self->arg.memfd, F_ADD_SEALS, F_SEAL_WRITE) == 0) {
		/* Sealed means that bytes stay: a write through us must not get through. */
		unsigned char was = 0, is = 0;

		ASSERT_EQ(1, pread(self->arg.memfd, &was, 1, 0));
		touch_write(guest, was + 1);
		ASSERT_EQ(1, pread(self->arg.memfd, &is, 1, 0));
		EXPECT_EQ(was, is) TH_LOG("a memfd with F_SEAL_WRITE was written");
	}
}

TEST_F(abi_create, einval_nr_pages)
{
	const __u64 bad[] = {
		0, PAGES + 1, KDP_MAX_PAGES + 1, 1ULL << 52, (1ULL << 52) + 1, (1ULL << 63) + 1,
		~0ULL, ~0ULL >> 12, (~0ULL >> 12) + 2,
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		self->arg.nr_pages = bad[i];
		EXPECT_REFUSED(EINVAL);
	}
}

TEST_F(abi_create, einval_above_max_pages)
{
	/* The memfd is long enough: it is the limit that is passed. */
	self->arg.memfd = memfd_shmem(KDP_MAX_PAGES + 2);
	ASSERT_LE(0, self->arg.memfd);
	self->arg.base_gfn = 0;
	self->arg.nr_pages = KDP_MAX_PAGES + 1;
	EXPECT_REFUSED(EINVAL);
	self->arg.nr_pages = KDP_MAX_PAGES;
	EXPECT_EQ(0, kdp_create(self->vm, &self->arg));
	EXPECT_EQ(0, kdp_remove(self->vm, 1));
}

TEST_F(abi_create, max_pages_work_at_both_ends)
{
	const __u64 last = KDP_MAX_PAGES - 1;
	unsigned char *first_page, *last_page;
	atomic_ullong *words;

	touch_init();
	self->arg.memfd = memfd_shmem(KDP_MAX_PAGES);
	ASSERT_LE(0, self->arg.memfd);
	self->arg.nr_pages = KDP_MAX_PAGES;
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	ASSERT_EQ(1, pwrite(self->arg.memfd, "L", 1, last * PAGE));
	ASSERT_EQ(1, pwrite(self->arg.memfd, "F", 1, 0));
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, last, 1).changed);
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, 0, 1).changed);
	EXPECT_EQ(EINVAL, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, last, 2).err);
	first_page = map_rw(_metadata, self->arg.fd, PAGE, 0);
	last_page = map_rw(_metadata, self->arg.fd, PAGE, last * PAGE);
	EXPECT_BYTE('F', first_page);
	EXPECT_BYTE('L', last_page);
	words = map_rw(_metadata, self->arg.fd, PAGE,
		       KDP_BITMAP_OFFSET + bitmap_bytes(KDP_MAX_PAGES) - PAGE);
	EXPECT_EQ(1ULL << 63, atomic_load(&words[511]));
}

TEST_F(abi_create, einval_memfd_offset)
{
	const __u64 bad[] = {
		1, 8, PAGE - 1, PAGE + 1, PAGE, PAGES * PAGE, ~0ULL, ~0ULL - PAGE + 1,
		1ULL << 63, (1ULL << 63) - PAGE,
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		self->arg.memfd_offset = bad[i];
		EXPECT_REFUSED(EINVAL);
	}
}

TEST_F(abi_create, einval_base_gfn)
{
	const __u64 bad[] = {
		TOP_GFN - PAGES + 1, TOP_GFN, TOP_GFN + 1, 1ULL << 52, ~0ULL - PAGES, ~0ULL,
		1ULL << 63,
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		self->arg.base_gfn = bad[i];
		EXPECT_REFUSED(EINVAL);
	}
	self->arg.base_gfn = TOP_GFN - PAGES;
	EXPECT_EQ(0, kdp_create(self->vm, &self->arg));
}

TEST_F(abi_create, hugetlb_alignment)
{
	struct kdp_memslot_get get;

	if (!hugetlb_reserve(1))
		SKIP(return, "no free 2 MiB page");
	close(self->arg.memfd);
	self->arg.memfd = memfd_sealed(MFD_HUGETLB | MFD_HUGE_2MB, 2 * 512, F_SEAL_SHRINK);
	ASSERT_LE(0, self->arg.memfd);
	self->arg.nr_pages = 511;
	EXPECT_REFUSED(EINVAL);
	self->arg.nr_pages = 513;
	EXPECT_REFUSED(EINVAL);
	self->arg.nr_pages = 1;
	EXPECT_REFUSED(EINVAL);
	self->arg.nr_pages = 512;
	self->arg.memfd_offset = PAGE;
	EXPECT_REFUSED(EINVAL);
	self->arg.memfd_offset = HUGE - PAGE;
	EXPECT_REFUSED(EINVAL);
	self->arg.memfd_offset = 2 * HUGE;
	EXPECT_REFUSED(EINVAL);
	self->arg.memfd_offset = HUGE;
	/* The GFN need not be aligned. */
	self->arg.base_gfn = slot_base(1) + 3;
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	ASSERT_EQ(0, kdp_get(self->vm, 1, 0, &get));
	EXPECT_EQ(HUGE, get.backing_page_size);
	EXPECT_EQ(HUGE, get.memfd_offset);
}

TEST_F(abi_create, eexist_slot)
{
	struct kdp_memslot_create again = good_create(_metadata, 1, PAGES);

	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	again.base_gfn = slot_base(7);
	EXPECT_EQ(EEXIST, kdp_create(self->vm, &again));
	ASSERT_EQ(0, kdp_remove(self->vm, 1));
	EXPECT_EQ(0, kdp_create(self->vm, &again));
}

TEST_F(abi_create, eexist_gfn)
{
	struct kdp_memslot_create next = good_create(_metadata, 2, PAGES);
	const __u64 base = self->arg.base_gfn;
	const struct { __u64 base, pages; } taken[] = {
		{ base, PAGES }, { base + PAGES - 1, 1 }, { base, 1 }, { base - 1, 2 },
		{ base + PAGES - 1, 2 }, { base - 1, PAGES }, { base + 3, 4 },
	};

	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	for (size_t i = 0; i < ARRAY_SIZE(taken); i++) {
		next.base_gfn = taken[i].base;
		next.nr_pages = taken[i].pages;
		EXPECT_EQ(EEXIST, kdp_create(self->vm, &next)) TH_LOG("case %zu", i);
	}
	/* One that contains it wholly. */
	next.memfd = memfd_shmem(PAGES + 2);
	next.base_gfn = base - 1;
	next.nr_pages = PAGES + 2;
	EXPECT_EQ(EEXIST, kdp_create(self->vm, &next));
	/* Right below and right above is free. */
	next.nr_pages = PAGES;
	next.base_gfn = base - PAGES;
	EXPECT_EQ(0, kdp_create(self->vm, &next));
	next.slot_id = 3;
	next.base_gfn = base + PAGES;
	EXPECT_EQ(0, kdp_create(self->vm, &next));
}

TEST_F(abi_create, one_memfd_for_two_memslots)
{
	struct slot a, b;
	struct kdp_memslot_create arg = self->arg;

	a = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	arg.slot_id = 2;
	arg.base_gfn = slot_base(2);
	arg.memfd = a.memfd;
	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	b = (struct slot){ .vm = self->vm, .id = 2, .pages = PAGES };
	b.guest = map_rw(_metadata, arg.fd, PAGES * PAGE, 0);
	/* One memory, but each memslot has states of its own. */
	a.alias[0] = 0x11;
	EXPECT_MARK(1, &a, KDP_STATE_PRESENT, 0, 1);
	EXPECT_MARK(1, &b, KDP_STATE_PRESENT, 0, 1);
	EXPECT_BYTE(0x11, a.guest);
	EXPECT_BYTE(0x11, b.guest);
	EXPECT_MARK(1, &a, KDP_STATE_ABSENT, 0, 1);
	EXPECT_BYTE(0x11, b.guest);
}

TEST_F(abi_create, enospc_max_memslots)
{
	int memfd = self->arg.memfd;
	struct kdp_memslot_get get;

	for (__u32 id = 0; id < KDP_MAX_MEMSLOTS; id++) {
		self->arg = KDP_ARG(kdp_memslot_create, .slot_id = id, .base_gfn = 2 * id,
				    .nr_pages = 1, .memfd = memfd);
		ASSERT_EQ(0, kdp_create(self->vm, &self->arg)) TH_LOG("memslot %u", id);
		close(self->arg.fd);
	}
	self->arg.slot_id = KDP_MAX_MEMSLOTS;
	self->arg.base_gfn = 2 * KDP_MAX_MEMSLOTS;
	EXPECT_EQ(ENOSPC, kdp_create(self->vm, &self->arg));
	EXPECT_EQ(0, kdp_get(self->vm, KDP_MAX_MEMSLOTS - 1, 0, &get));
	ASSERT_EQ(0, kdp_remove(self->vm, 17));
	EXPECT_EQ(0, kdp_create(self->vm, &self->arg));
	ASSERT_EQ(0, kdp_remove(self->vm, 18));
}

TEST_F(abi_create, emfile)
{
	struct kdp_memslot_get get;

	leave_fds(_metadata, 0);
	EXPECT_EQ(EMFILE, kdp_create(self->vm, &self->arg));
	leave_fds(_metadata, 1);
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 0, KDP_GET_NEXT, &get));
	EXPECT_EQ(0, kdp_create(self->vm, &self->arg));
	leave_fds(_metadata, -1);
}

static void write_number(struct __test_metadata *_metadata, const char *path, unsigned long value)
{
	FILE *f = fopen(path, "w");

	ASSERT_NE(NULL, f) TH_LOG("%s: %m", path);
	fprintf(f, "%lu", value);
	ASSERT_EQ(0, fclose(f));
}

/* The system has no file left. Root is given one all the same, so somebody else asks. */
TEST_F(abi_create, enfile)
{
	const char *max = "/proc/sys/fs/file-max";
	unsigned long before = 0;
	FILE *f = fopen(max, "r");
	pid_t child;

	ASSERT_NE(NULL, f);
	ASSERT_EQ(1, fscanf(f, "%lu", &before));
	fclose(f);
	ASSERT_EQ(0, kdp_create(self->vm, &self->arg));
	write_number(_metadata, max, 1);
	child = fork();
	if (!child) {
		struct kdp_memslot_create arg = self->arg;
		struct kdp_memslot_get get;

		if (setresuid(65534, 65534, 65534))
			_exit(1);
		arg.slot_id++;
		arg.base_gfn += PAGES;
		if (kdp_create(self->vm, &arg) != ENFILE)
			_exit(2);
		/* What exists is handed out: that takes a descriptor, but no file. */
		_exit(kdp_get(self->vm, self->arg.slot_id, KDP_GET_FD, &get) ? 3 : 0);
	}
	EXPECT_EQ(0, child_status(child));
	write_number(_metadata, max, before);
	EXPECT_EQ(0, kdp_remove(self->vm, self->arg.slot_id));
}
