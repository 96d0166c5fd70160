// SPDX-License-Identifier: GPL-2.0
/*
 * System calls of a process on a mapping of native memory, of which a part is present. Whether a
 * call succeeds or fails: a present page keeps its bytes, and an absent page stays absent. A
 * process never reads what the memfd holds at an absent page, be it old bytes or the zeros of a
 * hole.
 */
#include "test.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#define BLOCK		512
/* Pages 0 to 7 are present. Absent pages 8 to 15 have bytes in the memfd; the rest is a hole. */
#define PRESENT		8
#define STALE		16
#define WATCHED		24
#define STALE_BYTE	0xee

/* The C library may not know these yet. */
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL	102
#define MADV_GUARD_REMOVE	103
#endif

FIXTURE(native) {
	int vm;
	int mem;		/* /proc/self/mem: a read of an absent page fails at once */
	struct slot s;
};

FIXTURE_VARIANT(native) {
	bool private;
	bool large;		/* the memfd has one folio for the block */
};

FIXTURE_VARIANT_ADD(native, shared) { .private = false };
FIXTURE_VARIANT_ADD(native, private) { .private = true };
FIXTURE_VARIANT_ADD(native, large_folio) { .large = true };

#define THP_SYSFS	"/sys/kernel/mm/transparent_hugepage/shmem_enabled"

/* Makes the memfd allocate its whole block at once, as one folio. Returns whether it did. */
static bool allocate_large(struct slot *s)
{
	char now[128] = "", *old;
	FILE *f = fopen(THP_SYSFS, "re");
	struct stat st;
	bool ok;

	if (!f)
		return false;
	ok = fgets(now, sizeof(now), f) && (old = strchr(now, '['));
	fclose(f);
	if (!ok)
		return false;
	old++;
	old[strcspn(old, "]")] = 0;
	if (!write_text(THP_SYSFS, "always"))
		return false;
	/* By pwrite(2): a mapping would have to be aligned to a block. */
	ok = pwrite(s->memfd, "", 1, 0) == 1 && !fstat(s->memfd, &st) &&
	     st.st_blocks == (blkcnt_t)(BLOCK * PAGE / 512);
	return write_text(THP_SYSFS, old) && ok;
}

FIXTURE_SETUP(native)
{
	struct slot *s = &self->s;

	self->vm = vm_open(_metadata);
	*s = slot_new(_metadata, self->vm, 1, BLOCK, KDP_MEMSLOT_PAGING);
	if (variant->large && access(THP_SYSFS, W_OK))
		SKIP(return, "this kernel has no large folios in shmem");
	if (variant->large)
		ASSERT_TRUE(allocate_large(s));
	self->mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, self->mem);
	for (int page = 0; page < STALE; page++)
		memset(s->alias + page * PAGE, page < PRESENT ? 0x10 + page : STALE_BYTE, PAGE);
	EXPECT_MARK(PRESENT, s, KDP_STATE_PRESENT, 0, PRESENT);
}

FIXTURE_TEARDOWN(native)
{
	close(self->mem);
	close(self->vm);
}

/* Maps the memslot once more, and accesses its present pages, so that they are mapped there. */
static struct slot view_new(struct __test_metadata *_metadata, struct slot *s, bool private)
{
	struct slot view = *s;

	view.guest = mmap(NULL, BLOCK * PAGE, PROT_READ | PROT_WRITE,
			  private ? MAP_PRIVATE : MAP_SHARED, s->fd, 0);
	ASSERT_NE(MAP_FAILED, view.guest);
	for (int page = 0; page < PRESENT; page++) {
		EXPECT_BYTE(0x10 + page, view.guest + page * PAGE);
	}
	return view;
}

/*
 * EXPECT that present pages have their bytes, and that absent pages cannot be read. There must be
 * no event.
 */
static void expect_untouched(struct __test_metadata *_metadata, int mem, struct slot *view,
			     const char *what)
{
	unsigned char bytes[PAGE], want[PAGE];

	for (int page = 0; page < WATCHED; page++) {
		ssize_t n = pread(mem, bytes, PAGE, (uintptr_t)view->guest + page * PAGE);

		memset(want, 0x10 + page, PAGE);
		if (page < PRESENT) {
			EXPECT_EQ((ssize_t)PAGE, n) TH_LOG("%s: page %d: %m", what, page);
			EXPECT_EQ(0, memcmp(bytes, want, PAGE))
				TH_LOG("%s: page %d begins with %#x", what, page, bytes[0]);
		} else {
			EXPECT_EQ(-1, n)
				TH_LOG("%s: absent page %d reads as %#x", what, page, bytes[0]);
		}
		EXPECT_EQ(page < PRESENT, bit_get(view->bitmap, page))
			TH_LOG("%s: page %d", what, page);
	}
	EXPECT_FALSE(event_pending(view->vm, 0)) TH_LOG("%s: an event", what);
}

/*
 * EXPECT that a thread that reads an absent page waits. When the page is present, it reads what the
 * memfd has there.
 */
static void expect_waits(struct __test_metadata *_metadata, struct slot *view, int page)
{
	struct toucher t = { 0 };

	wait_begins(_metadata, view, &t, page, TOUCH_READ);
	EXPECT_MARK(1, view, KDP_STATE_PRESENT, page, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(page < STALE ? STALE_BYTE : 0, t.val);
	EXPECT_MARK(1, view, KDP_STATE_ABSENT, page, 1);
}

/* Advice, and the errno for a shared mapping and for a private one. */
static const struct advice {
	const char *name;
	int advice;
	int err;
	int private_err;
} advices[] = {
	{ "NORMAL", MADV_NORMAL, 0, 0 },
	{ "RANDOM", MADV_RANDOM, 0, 0 },
	{ "SEQUENTIAL", MADV_SEQUENTIAL, 0, 0 },
	{ "WILLNEED", MADV_WILLNEED, 0, 0 },
	{ "DONTNEED", MADV_DONTNEED, 0, 0 },
	{ "DONTNEED_LOCKED", MADV_DONTNEED_LOCKED, 0, 0 },
	{ "COLD", MADV_COLD, 0, 0 },
	{ "PAGEOUT", MADV_PAGEOUT, 0, 0 },
	/* For anonymous mappings. */
	{ "FREE", MADV_FREE, EINVAL, EINVAL },
	{ "WIPEONFORK", MADV_WIPEONFORK, EINVAL, EINVAL },
	{ "KEEPONFORK", MADV_KEEPONFORK, 0, 0 },
	/* The memslot's file is not the memfd: it has no `fallocate` to punch holes with. */
	{ "REMOVE", MADV_REMOVE, EOPNOTSUPP, EACCES },
	{ "DONTFORK", MADV_DONTFORK, 0, 0 },
	/* VM_DONTEXPAND */
	{ "DOFORK", MADV_DOFORK, EINVAL, EINVAL },
	{ "DONTDUMP", MADV_DONTDUMP, 0, 0 },
	{ "DODUMP", MADV_DODUMP, EINVAL, EINVAL },
	{ "COLLAPSE", MADV_COLLAPSE, EINVAL, EINVAL },
	{ "GUARD_INSTALL", MADV_GUARD_INSTALL, EINVAL, EINVAL },
	{ "GUARD_REMOVE", MADV_GUARD_REMOVE, EINVAL, EINVAL },
	{ "MERGEABLE", MADV_MERGEABLE, 0, 0 },
	{ "UNMERGEABLE", MADV_UNMERGEABLE, 0, 0 },
	{ "HUGEPAGE", MADV_HUGEPAGE, 0, 0 },
	{ "NOHUGEPAGE", MADV_NOHUGEPAGE, 0, 0 },
};

TEST_F(native, madvise)
{
	struct slot *s = &self->s;

	for (size_t i = 0; i < ARRAY_SIZE(advices); i++) {
		const struct advice *a = &advices[i];
		struct slot view = view_new(_metadata, s, variant->private);
		int want = variant->private ? a->private_err : a->err;
		int err = madvise(view.guest, BLOCK * PAGE, a->advice) ? errno : 0;

		/* The kernel may be built without this advice: ordinary memory then fails, too. */
		if (!want && err == EINVAL && madvise(s->alias, PAGE, a->advice))
			err = 0;
		EXPECT_EQ(want, err) TH_LOG("MADV_%s", a->name);
		expect_untouched(_metadata, self->mem, &view, a->name);
		for (int page = 0; page < PRESENT; page++) {
			EXPECT_BYTE(0x10 + page, view.guest + page * PAGE);
		}
		expect_waits(_metadata, &view, PRESENT + i % (WATCHED - PRESENT));
		expect_untouched(_metadata, self->mem, &view, a->name);
		ASSERT_EQ(0, munmap(view.guest, BLOCK * PAGE));
	}
}

/*
 * MADV_DONTNEED drops a private copy, as in any mapping. The next access then gets the memslot's
 * page, or waits if that is absent. Other advice keeps the copy.
 */
TEST(native_madvise_of_private_copies)
{
	int vm = vm_open(_metadata);
	struct slot s = slot_new(_metadata, vm, 1, BLOCK, KDP_MEMSLOT_PAGING);
	struct slot view = s;
	static const int keep[] = { MADV_COLD, MADV_PAGEOUT, MADV_FREE, MADV_WILLNEED };

	view.guest = mmap(NULL, BLOCK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, s.fd, 0);
	ASSERT_NE(MAP_FAILED, view.guest);
	for (int page = PRESENT; page < PRESENT + 2; page++)
		s.alias[page * PAGE] = STALE_BYTE;
	EXPECT_MARK(2, &s, KDP_STATE_PRESENT, PRESENT, 2);
	EXPECT_EQ(0, touch_write(view.guest + PRESENT * PAGE, 0x50));
	EXPECT_EQ(0, touch_write(view.guest + (PRESENT + 1) * PAGE, 0x51));
	EXPECT_MARK(1, &s, KDP_STATE_ABSENT, PRESENT, 1);
	for (size_t i = 0; i < ARRAY_SIZE(keep); i++) {
		madvise(view.guest, BLOCK * PAGE, keep[i]);
		EXPECT_BYTE(0x50, view.guest + PRESENT * PAGE);
		EXPECT_BYTE(0x51, view.guest + (PRESENT + 1) * PAGE);
	}
	ASSERT_EQ(0, madvise(view.guest, BLOCK * PAGE, MADV_DONTNEED));
	EXPECT_BYTE(STALE_BYTE, view.guest + (PRESENT + 1) * PAGE);
	expect_waits(_metadata, &view, PRESENT);
}

/* After MADV_DONTFORK, a child does not have the mapping. Its parent keeps it. */
TEST_F(native, dontfork)
{
	struct slot view = view_new(_metadata, &self->s, variant->private);
	pid_t child;

	ASSERT_EQ(0, madvise(view.guest, BLOCK * PAGE, MADV_DONTFORK));
	child = fork();
	if (!child) {
		unsigned char val;

		if (touch_read(view.guest, &val) != SIGSEGV ||
		    touch_read(view.guest + PRESENT * PAGE, &val) != SIGSEGV)
			_exit(1);
		_exit(0);
	}
	EXPECT_EQ(0, child_status(child));
	expect_untouched(_metadata, self->mem, &view, "DONTFORK");
	expect_waits(_metadata, &view, PRESENT);
}

/* Access rights are checked first: without the right, a thread gets SIGSEGV and does not wait. */
TEST_F(native, mprotect)
{
	struct slot view = view_new(_metadata, &self->s, variant->private);
	static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE };
	unsigned char val;

	for (size_t i = 0; i < ARRAY_SIZE(prots); i++) {
		bool reads = prots[i] & PROT_READ, writes = prots[i] & PROT_WRITE;

		ASSERT_EQ(0, mprotect(view.guest, BLOCK * PAGE, prots[i]));
		for (int page = PRESENT - 1; page <= PRESENT; page++) {
			if (!reads) {
				EXPECT_EQ(SIGSEGV, touch_read(view.guest + page * PAGE, &val));
			}
			if (!writes) {
				EXPECT_EQ(SIGSEGV, touch_write(view.guest + page * PAGE, 1));
			}
		}
		EXPECT_FALSE(event_pending(self->vm, 0));
		if (reads) {
			expect_untouched(_metadata, self->mem, &view, "mprotect");
			expect_waits(_metadata, &view, PRESENT);
		}
	}
	expect_untouched(_metadata, self->mem, &view, "mprotect");
}

/* A thread loses the right to read while it waits. When the page is present, it gets SIGSEGV. */
TEST_F(native, mprotect_while_somebody_waits)
{
	struct slot view = view_new(_metadata, &self->s, variant->private);
	struct toucher t = { 0 };

	wait_begins(_metadata, &view, &t, PRESENT, TOUCH_READ);
	ASSERT_EQ(0, mprotect(view.guest, BLOCK * PAGE, PROT_NONE));
	EXPECT_MARK(1, &view, KDP_STATE_PRESENT, PRESENT, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(SIGSEGV, t.result);
	EXPECT_MARK(1, &view, KDP_STATE_ABSENT, PRESENT, 1);
	ASSERT_EQ(0, mprotect(view.guest, BLOCK * PAGE, PROT_READ | PROT_WRITE));
	expect_untouched(_metadata, self->mem, &view, "mprotect");
}

/* mremap(2) moves all pages to the new address. A thread that waits at the old one gets SIGSEGV. */
TEST_F(native, mremap_while_somebody_waits)
{
	struct slot view = view_new(_metadata, &self->s, variant->private);
	void *to = mmap(NULL, BLOCK * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *old = view.guest, val;
	struct toucher t = { 0 };

	ASSERT_NE(MAP_FAILED, to);
	wait_begins(_metadata, &view, &t, PRESENT, TOUCH_READ);
	EXPECT_EQ(MAP_FAILED, mremap(old, BLOCK * PAGE, BLOCK * PAGE,
				     MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0));
	EXPECT_EQ(EINVAL, errno);
	view.guest = mremap(old, BLOCK * PAGE, BLOCK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	ASSERT_EQ(to, view.guest);
	EXPECT_MARK(1, &view, KDP_STATE_PRESENT, PRESENT, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(SIGSEGV, t.result);
	EXPECT_MARK(1, &view, KDP_STATE_ABSENT, PRESENT, 1);
	EXPECT_EQ(SIGSEGV, touch_read(old, &val));
	expect_untouched(_metadata, self->mem, &view, "mremap");
	expect_waits(_metadata, &view, PRESENT);
	/* Move a part of it. */
	ASSERT_EQ(old, mremap(view.guest + (PRESENT - 1) * PAGE, 3 * PAGE, 3 * PAGE,
			      MREMAP_MAYMOVE | MREMAP_FIXED, old));
	EXPECT_BYTE(0x10 + PRESENT - 1, old);
	EXPECT_BYTE(0x10, view.guest);
	view.guest = old - (PRESENT - 1) * PAGE;
	expect_waits(_metadata, &view, PRESENT + 1);
}

/*
 * mlock(2) of present pages does not wait, and does not set VM_LOCKED. munlock(2) does not wait for
 * absent pages either.
 */
TEST_F(native, mlock)
{
	struct slot view = view_new(_metadata, &self->s, variant->private);

	EXPECT_EQ(0, mlock(view.guest, PRESENT * PAGE));
	EXPECT_EQ(0, munlock(view.guest, BLOCK * PAGE));
	EXPECT_EQ(0, munlockall());
	/* MADV_DONTNEED and MADV_PAGEOUT would fail on locked memory. */
	EXPECT_EQ(0, mlock(view.guest, PRESENT * PAGE));
	EXPECT_EQ(0, madvise(view.guest, BLOCK * PAGE, MADV_PAGEOUT));
	EXPECT_EQ(0, madvise(view.guest, BLOCK * PAGE, MADV_DONTNEED));
	expect_untouched(_metadata, self->mem, &view, "mlock");
	expect_waits(_metadata, &view, PRESENT);
}

static int uffd_open(__u64 features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0)
		return -1;
	if (ioctl(uffd, UFFDIO_API, &api)) {
		close(uffd);
		return -1;
	}
	return uffd;
}

static void expect_no_uffd(struct __test_metadata *_metadata, int mem, struct slot *view, int uffd)
{
	static unsigned char source[PAGE];
	struct uffdio_range absent = { (uintptr_t)view->guest + PRESENT * PAGE, PAGE };
	struct uffdio_copy copy = { .dst = absent.start, .src = (uintptr_t)source, .len = PAGE };
	struct uffdio_zeropage zero = { .range = absent };
	struct uffdio_continue cont = { .range = absent };
	struct uffdio_writeprotect wp = { .range = { (uintptr_t)view->guest, BLOCK * PAGE },
					  .mode = UFFDIO_WRITEPROTECT_MODE_WP };

	/* Each mode, alone and with the next one. */
	for (__u64 bit = 1; bit <= 1 << 3; bit <<= 1)
		for (int i = 0; i < 4; i++) {
			__u64 pages = i & 1 ? PRESENT : BLOCK;
			struct uffdio_register reg = {
				.range = { (uintptr_t)view->guest, pages * PAGE },
				.mode = i & 2 ? bit | bit << 1 : bit,
			};

			EXPECT_EQ(-1, ioctl(uffd, UFFDIO_REGISTER, &reg))
				TH_LOG("mode %#llx is taken", (__u64)reg.mode);
			EXPECT_EQ(EINVAL, errno) TH_LOG("mode %#llx: %m", (__u64)reg.mode);
		}
	EXPECT_EQ(-1, ioctl(uffd, UFFDIO_COPY, &copy));
	EXPECT_EQ(-1, ioctl(uffd, UFFDIO_ZEROPAGE, &zero));
	EXPECT_EQ(-1, ioctl(uffd, UFFDIO_CONTINUE, &cont));
	EXPECT_EQ(-1, ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	expect_untouched(_metadata, mem, view, "userfaultfd");
	/* Nothing is write-protected. */
	EXPECT_EQ(0, touch_write(view->guest, 0x10));
}

/* userfaultfd(2) rejects the memslot's mapping in every mode. */
TEST_F(native, userfaultfd_is_refused)
{
	static const __u64 features[] = { 0, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED };
	struct slot view = view_new(_metadata, &self->s, variant->private);
	int tried = 0;

	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		int uffd = uffd_open(features[i]);

		if (uffd < 0)
			continue;
		tried++;
		expect_no_uffd(_metadata, self->mem, &view, uffd);
		expect_waits(_metadata, &view, PRESENT + i);
		close(uffd);
	}
	if (!tried)
		SKIP(return, "this kernel has no userfaultfd");
}

/*
 * userfaultfd(2) accepts the alias mapping. It fills pages of the memfd, and makes no page present.
 * A large folio has no hole to fill.
 */
TEST_F(native, userfaultfd_of_the_alias)
{
	static unsigned char source[PAGE];
	struct slot view = view_new(_metadata, &self->s, variant->private);
	const int page = STALE + 4;
	struct uffdio_register reg = {
		.range = { (uintptr_t)view.alias + page * PAGE, 2 * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	struct uffdio_copy copy = { .dst = reg.range.start, .src = (uintptr_t)source, .len = PAGE };
	struct uffdio_zeropage zero = { .range = { reg.range.start + PAGE, PAGE } };
	int uffd = uffd_open(0), want = variant->large ? EEXIST : 0;

	if (uffd < 0)
		SKIP(return, "this kernel has no userfaultfd");
	memset(source, 0x77, PAGE);
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_REGISTER, &reg));
	EXPECT_EQ(want, ioctl(uffd, UFFDIO_COPY, &copy) ? errno : 0);
	EXPECT_EQ(want, ioctl(uffd, UFFDIO_ZEROPAGE, &zero) ? errno : 0);
	expect_untouched(_metadata, self->mem, &view, "userfaultfd of the alias");
	EXPECT_MARK(2, &view, KDP_STATE_PRESENT, page, 2);
	EXPECT_BYTE(want ? 0 : 0x77, view.guest + page * PAGE);
	EXPECT_BYTE(0, view.guest + (page + 1) * PAGE);
	close(uffd);
}
