/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The kernel's kselftest harness, with the names and options that
 * selftests/run asks for: `PROG --list` prints the tests' names, and
 * `PROG NAME...` runs those. A test abi_create_good is called
 * abi-create-good; a test of a fixture is called FIXTURE-TEST-VARIANT.
 */
#ifndef KDP_SELFTESTS_TEST_H
#define KDP_SELFTESTS_TEST_H

/* Diagnostics belong to the TAP stream. */
#define TH_LOG_STREAM stdout
#include <kselftest_harness.h>

#include <dirent.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "touch.h"

/* A memslot under test and the views of it. */
struct slot {
	int vm;
	int fd;
	int memfd;
	__u32 id;
	__u64 base_gfn;
	__u64 pages;
	unsigned char *alias;	/* the memfd itself */
	unsigned char *guest;	/* the memslot's mapping */
	atomic_ullong *bitmap;	/* NULL unless paging is on */
};

static inline int vm_open(struct __test_metadata *_metadata)
{
	int vm = kdp_open();

	ASSERT_LE(0, vm)
		TH_LOG("open %s: %s; is the module inserted?", KDP_DEVICE_PATH, strerror(errno));
	return vm;
}

static inline void *map(int fd, __u64 bytes, int prot, __u64 offset)
{
	return mmap(NULL, bytes, prot, MAP_SHARED, fd, offset);
}

static inline void *map_rw(struct __test_metadata *_metadata, int fd, __u64 bytes, __u64 offset)
{
	void *p = map(fd, bytes, PROT_READ | PROT_WRITE, offset);

	ASSERT_NE(MAP_FAILED, p)
		TH_LOG("mmap of %llu bytes at %llx: %s", bytes, offset, strerror(errno));
	return p;
}

/* Slots lie 2^20 pages apart, in the order of their ids. */
static inline __u64 slot_base(__u32 id)
{
	return (__u64)(id + 1) << 20;
}

/* A good KDP_MEMSLOT_CREATE argument on a fresh shmem memfd, for tests that spoil one field. */
static inline struct kdp_memslot_create good_create(struct __test_metadata *_metadata,
						    __u32 id, __u64 pages)
{
	struct kdp_memslot_create arg = KDP_ARG(kdp_memslot_create,
		.slot_id = id, .base_gfn = slot_base(id), .nr_pages = pages,
		.memfd = memfd_shmem(pages), .fd = -1, .flags = KDP_MEMSLOT_PAGING);

	ASSERT_LE(0, arg.memfd);
	return arg;
}

static inline struct slot slot_on(struct __test_metadata *_metadata, int vm, __u32 id,
				  __u64 pages, __u32 flags, bool hugetlb)
{
	struct kdp_memslot_create arg = KDP_ARG(kdp_memslot_create,
		.slot_id = id, .base_gfn = slot_base(id), .nr_pages = pages, .flags = flags);
	struct slot s = { .vm = vm, .id = id, .base_gfn = arg.base_gfn, .pages = pages };

	s.memfd = memfd_sealed(hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0, pages, F_SEAL_SHRINK);
	ASSERT_LE(0, s.memfd);
	arg.memfd = s.memfd;
	ASSERT_EQ(0, kdp_create(vm, &arg));
	s.fd = arg.fd;
	s.alias = map_rw(_metadata, s.memfd, pages * PAGE, 0);
	s.guest = map_rw(_metadata, s.fd, pages * PAGE, 0);
	if (flags & KDP_MEMSLOT_PAGING)
		s.bitmap = map_rw(_metadata, s.fd, bitmap_bytes(pages), KDP_BITMAP_OFFSET);
	touch_init();
	return s;
}

static inline struct slot slot_new(struct __test_metadata *_metadata, int vm, __u32 id,
				   __u64 pages, __u32 flags)
{
	return slot_on(_metadata, vm, id, pages, flags, false);
}

/* EXPECT that marking works and changes so many pages. */
#define EXPECT_MARK(want_changed, slot, to_state, first_, count_) do {			\
	struct marked m_ = kdp_mark((slot)->vm, (slot)->id, to_state, first_, count_);	\
	EXPECT_EQ(0, m_.err);								\
	EXPECT_EQ(1, m_.done);								\
	EXPECT_EQ((__u64)(want_changed), m_.changed);					\
} while (0)

/* EXPECT that a byte reads as this, without waiting for ever to find out. */
#define EXPECT_BYTE(want, p) do {							\
	struct toucher t_ = { 0 };							\
	ASSERT_TRUE(toucher_start(&t_, p, TOUCH_READ));					\
	ASSERT_TRUE(toucher_join(&t_))							\
		TH_LOG("reading %s waits where it must not", #p);			\
	EXPECT_EQ(0, t_.result);							\
	EXPECT_EQ((want), t_.val);							\
} while (0)

static inline bool event_pending(int vm, int timeout_ms)
{
	struct pollfd pfd = { .fd = vm, .events = POLLIN };

	return poll(&pfd, 1, timeout_ms) == 1 && (pfd.revents & POLLIN);
}

/* Wait for one event and read it. */
static inline struct kdp_event event_read(struct __test_metadata *_metadata, int vm)
{
	struct kdp_event ev = { 0 };

	ASSERT_TRUE(event_pending(vm, PATIENCE_MS))
		TH_LOG("no event came");
	ASSERT_EQ(sizeof(ev), read(vm, &ev, sizeof(ev)));
	return ev;
}

/* Start a touch of an absent page and see that it waits: its event is read, and it is not done. */
static inline struct kdp_event wait_begins(struct __test_metadata *_metadata, struct slot *s,
					   struct toucher *t, __u64 page, enum touch_kind kind)
{
	struct kdp_event ev;

	ASSERT_TRUE(toucher_start(t, s->guest + page * PAGE, kind));
	ev = event_read(_metadata, s->vm);
	EXPECT_EQ(page, ev.page);
	EXPECT_EQ(0, atomic_load(&t->done));
	return ev;
}

static inline int open_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	while (dir && readdir(dir))
		n++;
	if (dir)
		closedir(dir);
	return n;
}

/* Leave room for no more than so many new descriptors; -1 lifts that again. */
static inline void leave_fds(struct __test_metadata *_metadata, int room)
{
	struct rlimit lim;
	int next;

	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &lim));
	lim.rlim_cur = lim.rlim_max;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &lim));
	if (room < 0)
		return;
	/* The lowest free descriptor: those below it are all taken. */
	next = dup(0);
	ASSERT_LE(0, next);
	close(next);
	lim.rlim_cur = next + room;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &lim));
}

/* Wait for a child; its exit status, or 1000 plus the signal that ended it. */
static inline int child_status(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static inline void test_name(char *out, size_t len, struct __fixture_metadata *f,
			     struct __fixture_variant_metadata *v, struct __test_metadata *t)
{
	snprintf(out, len, "%s%s%s%s%s", f == &_fixture_global ? "" : f->name,
		 f == &_fixture_global ? "" : "-", t->name, v->name[0] ? "-" : "", v->name);
	for (; *out; out++)
		if (*out == '_')
			*out = '-';
}

static inline bool test_chosen(const char *name, int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		if (!strcmp(name, argv[i]))
			return true;
	return argc == 1;
}

/* As the harness runs one, under the name that we list it by. */
static inline void test_run(struct __fixture_variant_metadata *v, struct __test_metadata *t,
			    const char *name, int timeout)
{
	pid_t pid;

	t->exit_code = KSFT_PASS;
	t->trigger = 0;
	t->timeout = timeout;
	memset(t->results->reason, 0, sizeof(t->results->reason));
	fflush(stdout);
	/* The child must not store to *t, which it shares with us. */
	pid = fork();
	if (pid == 0) {
		setpgrp();
		t->fn(t, v);
		_exit(t->exit_code);
	}
	if (pid < 0) {
		printf("# fork: %s\n", strerror(errno));
		t->exit_code = KSFT_FAIL;
	} else {
		t->pid = pid;
		__wait_for_test(t);
		/* Nothing of a test outlives it. */
		kill(-pid, SIGKILL);
	}
	ksft_test_result_code(t->exit_code, name, t->results->reason[0] ? "%s" : NULL,
			      t->results->reason);
}

typedef void test_visitor(struct __fixture_variant_metadata *v, struct __test_metadata *t,
			  const char *name, int timeout);

static inline void test_list(struct __fixture_variant_metadata *v, struct __test_metadata *t,
			     const char *name, int timeout)
{
	(void)v, (void)t, (void)timeout;
	puts(name);
}

static inline unsigned int test_each(test_visitor *visit, int argc, char **argv, int timeout)
{
	struct __fixture_variant_metadata none = { .name = "" }, *v;
	struct __fixture_metadata *f;
	struct __test_metadata *t;
	unsigned int count = 0;
	char name[256];

	for (f = __fixture_list; f; f = f->next)
		for (v = f->variant ?: &none; v; v = v->next)
			for (t = f->tests; t; t = t->next) {
				test_name(name, sizeof(name), f, v, t);
				if (!test_chosen(name, argc, argv))
					continue;
				count++;
				if (visit)
					visit(v, t, name, timeout);
			}
	return count;
}

/* A program is one file that includes this. */
int main(int argc, char **argv)
{
	const char *kind = getenv("KDP_KERNEL");
	/* The debug kernel is several times slower. */
	int timeout = kind && !strcmp(kind, "debug") ? 480 : 120;
	struct __fixture_metadata *f;
	struct __test_metadata *t;
	unsigned int count;
	void *results;

	if (argc == 2 && !strcmp(argv[1], "--list")) {
		test_each(test_list, 1, argv, 0);
		return 0;
	}
	count = test_each(NULL, argc, argv, 0);
	if (argc > 1 && count != (unsigned int)argc - 1) {
		fprintf(stderr, "%s: has %u of the %d tests asked for; see %s --list\n",
			argv[0], count, argc - 1, argv[0]);
		return 1;
	}
	results = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (results == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	for (f = __fixture_list; f; f = f->next)
		for (t = f->tests; t; t = t->next)
			t->results = results;
	ksft_print_header();
	ksft_set_plan(count);
	test_each(test_run, argc, argv, timeout);
	return ksft_get_fail_cnt() || ksft_get_error_cnt() ? 1 : 0;
}

#endif
