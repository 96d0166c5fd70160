// SPDX-License-Identifier: GPL-2.0
/*
 * Fault injection: each call is made again and again, and its n-th allocation
 * or user copy fails, for n = 1, 2, ... until it has no n-th. Whatever comes
 * out of it must be an error that the ABI knows, and the same call must then
 * work as if nothing had been. The debug kernel's sanitizers watch.
 */
#include "test.h"

#define PAGES	64
#define MOST	2000	/* faults of one call; far above what any has */

struct injector {
	int fd;
	unsigned int n;
	bool fired;
};

static void set_debugfs(const char *file, const char *value)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/kernel/debug/%s", file);
	write_text(path, value);
}

FIXTURE(inject) {
	int vm;
	struct slot s;
	struct injector in;
};

FIXTURE_SETUP(inject)
{
	self->in.fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	if (self->in.fd < 0)
		SKIP(return, "this kernel has no fault injection: it is for the debug kernel");
	/* Let any allocation fail, also those that may sleep and single pages. */
	set_debugfs("failslab/ignore-gfp-wait", "N");
	set_debugfs("fail_page_alloc/ignore-gfp-wait", "N");
	set_debugfs("fail_page_alloc/ignore-gfp-highmem", "N");
	set_debugfs("fail_page_alloc/min-order", "0");
	/* The log is for what goes wrong. */
	set_debugfs("failslab/verbose", "0");
	set_debugfs("fail_page_alloc/verbose", "0");
	set_debugfs("fail_usercopy/verbose", "0");
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	memset(self->s.alias, 0xab, PAGES * PAGE);
}

FIXTURE_TEARDOWN(inject)
{
	close(self->vm);
}

static bool inject_next(struct __test_metadata *_metadata, struct injector *in)
{
	if (in->n && !in->fired) {
		/* Nothing was hit: that was one more than there are. There must have been some. */
		EXPECT_LT(1, in->n) TH_LOG("no fault could be injected at all");
		return false;
	}
	in->n++;
	ASSERT_GT(MOST, in->n) TH_LOG("no end of faults: is the call in a loop?");
	return true;
}

static void inject_on(struct injector *in)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", in->n);

	if (pwrite(in->fd, text, len, 0) != len)
		abort();
}

static void inject_off(struct injector *in)
{
	char text[16] = "";
	ssize_t len = pread(in->fd, text, sizeof(text) - 1, 0);

	/* These two calls can themselves be hit: then the call under test was not. */
	in->fired = len > 0 && atoi(text) == 0;
	if (pwrite(in->fd, "0", 1, 0) != 1)
		in->fired = false;
	if (pwrite(in->fd, "0", 1, 0) != 1)
		abort();
}

/* What an allocation or a user copy that fails may come out as. */
#define EXPECT_CLEAN(err) do {								\
	int err_ = (err);								\
	EXPECT_TRUE(err_ == 0 || err_ == ENOMEM || err_ == EFAULT)			\
		TH_LOG("fault %u came out as %s", self->in.n, strerror(err_));		\
} while (0)

TEST_F(inject, open)
{
	while (inject_next(_metadata, &self->in)) {
		int vm;

		inject_on(&self->in);
		vm = kdp_open();
		int err = vm < 0 ? errno : 0;

		inject_off(&self->in);
		/* The file system has errors of its own. */
		EXPECT_TRUE(!err || err == ENOMEM || err == ENFILE || err == EFAULT)
			TH_LOG("open: %s", strerror(err));
		if (vm >= 0)
			close(vm);
	}
}

static void create_injected(struct __test_metadata *_metadata, struct _test_data_inject *self,
			    const char *name, __u32 flags)
{
	struct kdp_memslot_create arg = good_create(_metadata, 2, PAGES);

	arg.flags = flags;
	memcpy(arg.name, name, strlen(name));
	while (inject_next(_metadata, &self->in)) {
		int fds = open_fds();
		int err;

		inject_on(&self->in);
		err = kdp_create(self->vm, &arg);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		if (err) {
			EXPECT_EQ(fds, open_fds());
			EXPECT_EQ(ENOENT, kdp_remove(self->vm, 2));
			/* Id, GFNs and name are free: nothing of the failed one is left. */
			ASSERT_EQ(0, kdp_create(self->vm, &arg))
				TH_LOG("after fault %u", self->in.n);
		}
		close(arg.fd);
		ASSERT_EQ(0, kdp_remove(self->vm, 2));
	}
}

TEST_F(inject, create)
{
	create_injected(_metadata, self, "", 0);
}

TEST_F(inject, create_paging)
{
	create_injected(_metadata, self, "", KDP_MEMSLOT_PAGING);
}

TEST_F(inject, create_named)
{
	create_injected(_metadata, self, "st-inject", KDP_MEMSLOT_PAGING);
}

TEST_F(inject, remove)
{
	struct kdp_memslot_create arg = good_create(_metadata, 2, PAGES);

	memcpy(arg.name, "st-inject-rm", 12);
	while (inject_next(_metadata, &self->in)) {
		int err;

		ASSERT_EQ(0, kdp_create(self->vm, &arg));
		inject_on(&self->in);
		err = kdp_remove(self->vm, 2);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		if (err) {
			ASSERT_EQ(0, kdp_remove(self->vm, 2));
		}
		close(arg.fd);
	}
}

TEST_F(inject, get)
{
	struct kdp_memslot_get get;

	while (inject_next(_metadata, &self->in)) {
		int fds = open_fds(), err;

		inject_on(&self->in);
		err = kdp_get(self->vm, 1, KDP_GET_FD | KDP_GET_MEMFD, &get);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		EXPECT_EQ(fds + (err ? 0 : 2), open_fds());
		if (!err) {
			close(get.fd);
			close(get.memfd);
		}
	}
}

TEST_F(inject, info)
{
	struct kdp_info info;

	while (inject_next(_metadata, &self->in)) {
		int err;

		inject_on(&self->in);
		err = kdp_info(self->vm, &info);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
	}
}

static void mark_injected(struct __test_metadata *_metadata, struct _test_data_inject *self,
			  __u32 from, __u32 to)
{
	const struct kdp_range ranges[] = { { 0, 7 }, { 10, 1 }, { 40, PAGES - 40 } };
	const __u64 pages = 7 + 1 + PAGES - 40;

	while (inject_next(_metadata, &self->in)) {
		struct marked m;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, from == KDP_STATE_PRESENT ?
					KDP_PAGING_ON_PRESENT : KDP_PAGING_ON));
		if (from == KDP_STATE_ZERO) {
			EXPECT_MARK(PAGES, &self->s, KDP_STATE_ZERO, 0, PAGES);
		}
		inject_on(&self->in);
		m = kdp_mark_ranges(self->vm, 1, to, ranges, 3);
		inject_off(&self->in);
		EXPECT_CLEAN(m.err);
		if (!m.err) {
			EXPECT_EQ(3, m.done);
			EXPECT_EQ(pages, m.changed);
		} else {
			/* However far it got: the whole call, made again, completes it. */
			m = kdp_mark_ranges(self->vm, 1, to, ranges, 3);
			EXPECT_EQ(0, m.err);
			EXPECT_EQ(3, m.done);
			m = kdp_mark_ranges(self->vm, 1, to, ranges, 3);
			EXPECT_EQ(0, m.changed);
		}
	}
}

TEST_F(inject, mark_present)
{
	mark_injected(_metadata, self, KDP_STATE_ABSENT, KDP_STATE_PRESENT);
}

TEST_F(inject, mark_absent)
{
	mark_injected(_metadata, self, KDP_STATE_PRESENT, KDP_STATE_ABSENT);
}

TEST_F(inject, mark_zero)
{
	mark_injected(_metadata, self, KDP_STATE_ABSENT, KDP_STATE_ZERO);
}

TEST_F(inject, mark_zero_present)
{
	mark_injected(_metadata, self, KDP_STATE_ZERO, KDP_STATE_PRESENT);
}

TEST_F(inject, poison)
{
	while (inject_next(_metadata, &self->in)) {
		struct marked m;

		inject_on(&self->in);
		m = kdp_poison(self->vm, 1, 5, 40);
		inject_off(&self->in);
		EXPECT_CLEAN(m.err);
		if (m.err) {
			/* However far it got: the call, made again, completes it. */
			m = kdp_poison(self->vm, 1, 5, 40);
			EXPECT_EQ(0, m.err);
		} else {
			EXPECT_EQ(40, m.changed);
		}
		m = kdp_heal(self->vm, 1, 0, PAGES);
		EXPECT_EQ(0, m.err);
		EXPECT_EQ(40, m.changed);
	}
}

static void paging_injected(struct __test_metadata *_metadata, struct _test_data_inject *self,
			    __u32 from, __u32 to)
{
	while (inject_next(_metadata, &self->in)) {
		int err;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, from));
		inject_on(&self->in);
		err = kdp_paging(self->vm, 1, to);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		if (err) {
			ASSERT_EQ(0, kdp_paging(self->vm, 1, to));
		}
	}
}

TEST_F(inject, paging_on)
{
	paging_injected(_metadata, self, KDP_PAGING_OFF, KDP_PAGING_ON);
}

TEST_F(inject, paging_on_present)
{
	paging_injected(_metadata, self, KDP_PAGING_OFF, KDP_PAGING_ON_PRESENT);
}

TEST_F(inject, paging_off)
{
	paging_injected(_metadata, self, KDP_PAGING_ON, KDP_PAGING_OFF);
}

TEST_F(inject, exits)
{
	struct kdp_info info;

	ASSERT_EQ(0, kdp_info(self->vm, &info));
	if (!(info.features & KDP_FEATURE_EXITS))
		SKIP(return, "KVM is not loaded");
	while (inject_next(_metadata, &self->in)) {
		int err;

		ASSERT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
		inject_on(&self->in);
		err = kdp_exits(self->vm, KDP_EXITS_ON);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
	}
}

TEST_F(inject, map_and_touch)
{
	while (inject_next(_metadata, &self->in)) {
		unsigned char *p, val = 0;
		int sig = 0;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 5, 1);
		inject_on(&self->in);
		p = map(self->s.fd, PAGES * PAGE, PROT_READ | PROT_WRITE, 0);
		if (p != MAP_FAILED)
			sig = touch_read(p + 5 * PAGE, &val);
		inject_off(&self->in);
		if (p == MAP_FAILED)
			continue;
		EXPECT_TRUE(sig == 0 || sig == SIGBUS);
		if (!sig) {
			EXPECT_EQ(0xab, val);
		}
		/* It was no fate. */
		EXPECT_EQ(0, touch_read(p + 5 * PAGE, &val));
		EXPECT_EQ(0xab, val);
		munmap(p, PAGES * PAGE);
	}
}

TEST_F(inject, touch_zero)
{
	while (inject_next(_metadata, &self->in)) {
		unsigned char val = 0xff;
		int sig;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		self->s.alias[6 * PAGE] = 0xab;
		EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 6, 1);
		inject_on(&self->in);
		sig = touch_read(self->s.guest + 6 * PAGE, &val);
		inject_off(&self->in);
		EXPECT_TRUE(sig == 0 || sig == SIGBUS);
		if (!sig) {
			EXPECT_EQ(0, val);
		}
		EXPECT_EQ(0, touch_read(self->s.guest + 6 * PAGE, &val));
		EXPECT_EQ(0, val);
	}
}

TEST_F(inject, bitmap_touch)
{
	while (inject_next(_metadata, &self->in)) {
		unsigned char val;
		int sig;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		inject_on(&self->in);
		sig = touch_or(self->s.bitmap, 2);
		inject_off(&self->in);
		EXPECT_TRUE(sig == 0 || sig == SIGBUS);
		EXPECT_EQ(0, touch_or(self->s.bitmap, 2));
		EXPECT_EQ(0, touch_read(self->s.guest + PAGE, &val));
		EXPECT_EQ(0xab, val);
	}
}

static void touch_sourced(struct __test_metadata *_metadata, struct _test_data_inject *self, int fd)
{
	while (inject_next(_metadata, &self->in)) {
		unsigned char val = 0xff;
		int sig, err;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		inject_on(&self->in);
		err = kdp_source(self->vm, 1, fd, 0, &(struct kdp_range){ 3, 9 }, 1);
		inject_off(&self->in);
		EXPECT_CLEAN(err);
		if (!self->in.fired) {
			inject_on(&self->in);
			sig = touch_read(self->s.guest + 6 * PAGE, &val);
			inject_off(&self->in);
			EXPECT_TRUE(sig == 0 || sig == SIGBUS);
			if (!sig) {
				EXPECT_EQ(0xcd, val);
			}
		}
		if (err) {
			ASSERT_EQ(0, kdp_source(self->vm, 1, fd, 0, &(struct kdp_range){ 3, 9 }, 1));
		}
		EXPECT_EQ(0, touch_read(self->s.guest + 6 * PAGE, &val));
		EXPECT_EQ(0xcd, val);
		/* The failure, if there was one, is told. */
		while (event_pending(self->vm, 0)) {
			EXPECT_EQ(KDP_EVENT_SOURCE_ERROR, event_read(_metadata, self->vm).type);
		}
	}
}

TEST_F(inject, source)
{
	int fd = memfd_shmem(PAGES);
	unsigned char page[PAGE];

	memset(page, 0xcd, PAGE);
	for (int i = 0; i < PAGES; i++)
		ASSERT_EQ(PAGE, pwrite(fd, page, PAGE, i * PAGE));
	touch_sourced(_metadata, self, fd);
}

TEST_F(inject, claim)
{
	while (inject_next(_metadata, &self->in)) {
		struct kdp_claimant own = KDP_ARG(kdp_claimant, .slot_id = 1);
		struct kdp_claim claim = KDP_ARG(kdp_claim, .first = 20, .count = 8);
		int fds = open_fds(), err;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		inject_on(&self->in);
		err = kdp_ioctl(self->vm, KDP_CLAIMANT, &own);
		inject_off(&self->in);
		EXPECT_TRUE(err == ENFILE || err == 0 || err == ENOMEM || err == EFAULT);
		if (err) {
			EXPECT_EQ(fds, open_fds());
			ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_CLAIMANT, &own));
		} else if (!self->in.fired) {
			inject_on(&self->in);
			err = kdp_ioctl(own.fd, KDP_CLAIM, &claim);
			if (!err)
				err = kdp_ioctl(own.fd, KDP_COMMIT, &claim);
			inject_off(&self->in);
			EXPECT_CLEAN(err);
		}
		/* Whatever was left of the first claims is claimed, and committed, now. */
		kdp_ioctl(own.fd, KDP_CLAIM, &claim);
		EXPECT_EQ(0, kdp_ioctl(own.fd, KDP_COMMIT, &claim));
		EXPECT_MARK(0, &self->s, KDP_STATE_PRESENT, 20, 8);
		close(own.fd);
		EXPECT_EQ(fds, open_fds());
	}
}

/* Who is to wait, and cannot be made to: gets an error, never a page that nobody placed. */
TEST_F(inject, wait)
{
	int status;

	while (inject_next(_metadata, &self->in)) {
		int fired[2];
		pid_t child;
		char c = 0;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		ASSERT_EQ(0, pipe2(fired, O_CLOEXEC));
		child = fork();
		if (!child) {
			struct injector in = { .n = self->in.n };
			unsigned char val = 0;
			int sig;

			in.fd = open("/proc/thread-self/fail-nth", O_RDWR);
			inject_on(&in);
			sig = touch_read(self->s.guest + 8 * PAGE, &val);
			inject_off(&in);
			if (write(fired[1], in.fired ? "1" : "0", 1) != 1)
				_exit(3);
			if (sig)
				_exit(sig == SIGBUS ? 0 : 1);
			_exit(val == 0xab ? 0 : 2);
		}
		while (waitpid(child, &status, WNOHANG) != child) {
			if (event_pending(self->vm, 10)) {
				event_read(_metadata, self->vm);
				EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 8, 1);
			}
		}
		EXPECT_EQ(0, status);
		ASSERT_EQ(1, read(fired[0], &c, 1));
		self->in.fired = c == '1';
		close(fired[0]);
		close(fired[1]);
	}
}

TEST_F(inject, read_event)
{
	struct kdp_event ev;

	while (inject_next(_metadata, &self->in)) {
		unsigned char val;
		ssize_t got;
		pid_t child;

		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		child = fork();
		if (!child)
			_exit(touch_read(self->s.guest + 9 * PAGE, &val) || val != 0xab);
		ASSERT_TRUE(event_pending(self->vm, PATIENCE_MS));
		inject_on(&self->in);
		got = read(self->vm, &ev, sizeof(ev));
		int err = got < 0 ? errno : 0;

		inject_off(&self->in);
		EXPECT_CLEAN(err);
		/* What was not handed over is still there. */
		if (err)
			ev = event_read(_metadata, self->vm);
		EXPECT_EQ(9, ev.page);
		EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 9, 1);
		EXPECT_EQ(0, child_status(child));
	}
}
