// SPDX-License-Identifier: GPL-2.0
/*
 * Invariant 8, who is charged for memory. Pages of shmem are not pinned: they do not count for
 * RLIMIT_MEMLOCK, and a punched hole frees them. Huge pages come out of the pool of hugetlb.
 * behaviour/src/tests/native_memcg.rs tests memory cgroups.
 */
#include "test.h"

#include <sys/stat.h>

#define PAGES	64
#define USER	40001

/*
 * A VM of a user who may lock no memory and has no capabilities. The node of the device belongs
 * to root, so the VM is opened with root's capabilities.
 */
static int unprivileged_vm(struct __test_metadata *_metadata)
{
	struct rlimit none = { 0, 0 };
	int vm;

	ASSERT_EQ(0, setreuid(USER, 0));
	vm = vm_open(_metadata);
	ASSERT_EQ(0, setrlimit(RLIMIT_MEMLOCK, &none));
	ASSERT_EQ(0, setresuid(USER, USER, USER));
	return vm;
}

/* Touch the pages in order; how many could be had before one was refused. */
static __u64 touch_all(struct slot *s)
{
	unsigned char val;
	__u64 page;

	for (page = 0; page < s->pages; page++)
		if (touch_read(s->guest + page * PAGE, &val) ||
		    touch_write(s->guest + page * PAGE, 1))
			break;
	return page;
}

/* A number of KiB in /proc/self/status; -1 if there is none. */
static long status_kib(const char *name)
{
	FILE *f = fopen("/proc/self/status", "re");
	size_t len = strlen(name);
	char line[256];
	long kib = -1;

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, name, len) && line[len] == ':')
			kib = strtol(line + len + 1, NULL, 10);
	if (f)
		fclose(f);
	return kib;
}

TEST(native_memlock_is_not_charged)
{
	int vm = unprivileged_vm(_metadata);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	long pinned = status_kib("VmPin"), locked = status_kib("VmLck");
	struct toucher t = { 0 };

	ASSERT_LE(0, pinned);
	ASSERT_LE(0, locked);
	/* A page that is known to be zero needs memory as well. */
	EXPECT_MARK(PAGES / 2, &s, KDP_STATE_PRESENT, 0, PAGES / 2);
	EXPECT_MARK(PAGES / 2, &s, KDP_STATE_ZERO, PAGES / 2, PAGES / 2);
	ASSERT_TRUE(toucher_start(&t, s.guest + 3 * PAGE, TOUCH_KERNEL));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(PAGES, touch_all(&s));
	s.guest = map_rw(_metadata, s.fd, PAGES * PAGE, 0);
	EXPECT_EQ(PAGES, touch_all(&s));
	EXPECT_EQ(pinned, status_kib("VmPin"));
	EXPECT_EQ(locked, status_kib("VmLck"));
}

TEST(native_memlock_is_not_charged_with_paging_off)
{
	int vm = unprivileged_vm(_metadata);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, 0);
	long pinned = status_kib("VmPin");

	EXPECT_EQ(PAGES, touch_all(&s));
	/* Switching paging off fills pages that are zero. */
	ASSERT_EQ(0, kdp_paging(vm, 1, KDP_PAGING_ON));
	EXPECT_MARK(PAGES, &s, KDP_STATE_ZERO, 0, PAGES);
	ASSERT_EQ(0, kdp_paging(vm, 1, KDP_PAGING_OFF));
	EXPECT_BYTE(0, s.guest + 9 * PAGE);
	EXPECT_EQ(PAGES, touch_all(&s));
	EXPECT_EQ(pinned, status_kib("VmPin"));
}

/* The memory that a memfd has, in pages. */
static long memfd_pages(int memfd)
{
	struct stat st;

	return fstat(memfd, &st) ? -1 : st.st_blocks * 512 / (long)PAGE;
}

static int punch(struct slot *s, __u64 first, __u64 count)
{
	return fallocate(s->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * PAGE,
			 count * PAGE);
}

TEST(native_absent_memory_is_given_back)
{
	int vm = vm_open(_metadata);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, KDP_MEMSLOT_PAGING);

	EXPECT_MARK(PAGES, &s, KDP_STATE_PRESENT, 0, PAGES);
	EXPECT_EQ(0, memfd_pages(s.memfd));
	EXPECT_EQ(PAGES, touch_all(&s));
	EXPECT_EQ(PAGES, memfd_pages(s.memfd));
	EXPECT_MARK(PAGES / 2, &s, KDP_STATE_ABSENT, 0, PAGES / 2);
	EXPECT_EQ(PAGES, memfd_pages(s.memfd));
	ASSERT_EQ(0, punch(&s, 0, PAGES / 2));
	EXPECT_EQ(PAGES / 2, memfd_pages(s.memfd));
	/* Who makes it present without writing it has zeros, and memory again. */
	EXPECT_MARK(PAGES / 2, &s, KDP_STATE_PRESENT, 0, PAGES / 2);
	EXPECT_BYTE(0, s.guest);
	EXPECT_EQ(PAGES / 2 + 1, memfd_pages(s.memfd));
}

/* The memfd's hole is what everybody sees, but for who has a private copy. */
TEST(native_hole_under_a_present_page_is_zeros)
{
	int vm = vm_open(_metadata);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	unsigned char *own = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, s.fd, 0);

	ASSERT_NE(MAP_FAILED, own);
	for (int page = 4; page < 7; page++)
		s.alias[page * PAGE] = page;
	EXPECT_MARK(3, &s, KDP_STATE_PRESENT, 4, 3);
	EXPECT_BYTE(4, s.guest + 4 * PAGE);
	EXPECT_BYTE(5, s.guest + 5 * PAGE);
	EXPECT_BYTE(5, own + 5 * PAGE);
	EXPECT_EQ(0, touch_write(own + 6 * PAGE, 0x66));
	ASSERT_EQ(0, punch(&s, 5, 2));
	EXPECT_BYTE(4, s.guest + 4 * PAGE);
	EXPECT_BYTE(0, s.guest + 5 * PAGE);
	EXPECT_BYTE(0, own + 5 * PAGE);
	EXPECT_BYTE(0, s.guest + 6 * PAGE);
	EXPECT_BYTE(0x66, own + 6 * PAGE);
	EXPECT_TRUE(bit_get(s.bitmap, 5));
	EXPECT_FALSE(event_pending(vm, 0));
	/* And it is the memfd's memory again. */
	EXPECT_EQ(0, touch_write(s.guest + 5 * PAGE, 0x55));
	EXPECT_EQ(0x55, s.alias[5 * PAGE]);
}

TEST(limit_hugetlb_is_not_charged)
{
	struct slot s;
	int vm;

	if (!hugetlb_reserve(2))
		SKIP(return, "no two free 2 MiB pages");
	vm = unprivileged_vm(_metadata);
	s = slot_on(_metadata, vm, 1, 1024, KDP_MEMSLOT_PAGING, true);
	EXPECT_MARK(1024, &s, KDP_STATE_PRESENT, 0, 1024);
	EXPECT_EQ(1024, touch_all(&s));
}

/* Huge pages that this process reserves, so that nobody else can have them. */
struct hog {
	void *p[8];
	size_t bytes[8];
	int n;
};

/* Reserve all that are free. What an ended process had may come back later: try more than once. */
static void hog_start(struct hog *hog)
{
	for (int i = 0; i < 8; i++) {
		long left = read_number(HUGETLB_SYSFS "free_hugepages") -
			    read_number(HUGETLB_SYSFS "resv_hugepages");
		size_t bytes = left * HUGE;
		int fd = memfd_sealed(MFD_HUGETLB | MFD_HUGE_2MB, left * 512, 0);
		void *p = left > 0 ? map(fd, bytes, PROT_READ | PROT_WRITE, 0) : MAP_FAILED;

		if (fd >= 0)
			close(fd);
		if (p != MAP_FAILED) {
			hog->p[hog->n] = p;
			hog->bytes[hog->n++] = bytes;
		}
		usleep(20 * 1000);
	}
}

static void hog_stop(struct hog *hog)
{
	while (hog->n--)
		munmap(hog->p[hog->n], hog->bytes[hog->n]);
}

/* Switching paging off has to fill zero pages, which takes memory that may not be there. */
TEST(limit_paging_off_without_huge_pages_is_enomem)
{
	static const __u32 modes[] = { KDP_PAGING_OFF, KDP_PAGING_ON_PRESENT };
	int vm = vm_open(_metadata);
	struct kdp_memslot_create create = good_create(_metadata, 1, 512);
	struct slot s = { .vm = vm, .id = 1, .pages = 512 };
	struct kdp_memslot_get get;
	struct toucher t = { 0 };
	struct hog hog = { 0 };

	if (!hugetlb_reserve(1))
		SKIP(return, "no free 2 MiB page");
	/* No mapping of the memfd: that would reserve a huge page. */
	close(create.memfd);
	create.memfd = memfd_sealed(MFD_HUGETLB | MFD_HUGE_2MB, 512, F_SEAL_SHRINK);
	ASSERT_LE(0, create.memfd);
	ASSERT_EQ(0, kdp_create(vm, &create));
	s.guest = map_rw(_metadata, create.fd, 512 * PAGE, 0);
	s.bitmap = map_rw(_metadata, create.fd, bitmap_bytes(512), KDP_BITMAP_OFFSET);
	touch_init();
	hog_start(&hog);
	EXPECT_MARK(511, &s, KDP_STATE_ZERO, 0, 511);
	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(ENOMEM, kdp_paging(vm, 1, modes[i]));
		EXPECT_EQ(0, kdp_get(vm, 1, 0, &get));
		EXPECT_EQ(KDP_PAGING_ON, get.paging);
	}
	EXPECT_EQ(SIGBUS, touch_write(s.guest, 1));
	/* Nothing has changed: zero pages are not present, and the absent page is absent. */
	EXPECT_FALSE(bit_get(s.bitmap, 0));
	EXPECT_FALSE(bit_get(s.bitmap, 511));
	wait_begins(_metadata, &s, &t, 511, TOUCH_READ);
	hog_stop(&hog);
	EXPECT_MARK(1, &s, KDP_STATE_PRESENT, 511, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(0, kdp_paging(vm, 1, KDP_PAGING_OFF));
	EXPECT_BYTE(0, s.guest + 510 * PAGE);
}
