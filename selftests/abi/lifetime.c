// SPDX-License-Identifier: GPL-2.0
/* What outlives what: fork, mremap, munmap, closed VMs, removed memslots, the module. */
#include "test.h"

#define PAGES	64

FIXTURE(lifetime) {
	int vm;
	struct slot s;
};

FIXTURE_SETUP(lifetime)
{
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	for (int page = 0; page < PAGES; page++)
		self->s.alias[page * PAGE] = page + 1;
}

FIXTURE_TEARDOWN(lifetime)
{
	close(self->vm);
}

TEST_F(lifetime, fork_shares)
{
	struct slot *s = &self->s;
	struct kdp_event ev;
	pid_t child;

	EXPECT_MARK(2, s, KDP_STATE_PRESENT, 0, 2);
	EXPECT_MARK(1, s, KDP_STATE_ZERO, 2, 1);
	EXPECT_BYTE(1, s->guest);
	child = fork();
	if (!child) {
		unsigned char val;

		/* What the parent had mapped, what it had not, what is zero, what is absent. */
		if (touch_read(s->guest, &val) || val != 1)
			_exit(1);
		if (touch_read(s->guest + PAGE, &val) || val != 2)
			_exit(2);
		if (touch_write(s->guest + PAGE, 0x77))
			_exit(3);
		if (touch_read(s->guest + 2 * PAGE, &val) || val)
			_exit(4);
		if (touch_read(s->guest + 3 * PAGE, &val) || val != 4)
			_exit(5);
		/* Nothing is copied on write: one memory. */
		if (touch_write(s->guest, 0x78))
			_exit(6);
		_exit(0);
	}
	ev = event_read(_metadata, s->vm);
	EXPECT_EQ(3, ev.page);
	EXPECT_EQ(child, ev.tid);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 3, 1);
	EXPECT_EQ(0, child_status(child));
	EXPECT_BYTE(0x77, s->guest + PAGE);
	EXPECT_BYTE(0x78, s->guest);
	EXPECT_EQ(0x78, s->alias[0]);
}

TEST_F(lifetime, child_keeps_the_vm)
{
	struct slot *s = &self->s;
	int go[2];
	pid_t child;
	struct toucher t = { 0 };

	ASSERT_EQ(0, pipe2(go, O_CLOEXEC));
	child = fork();
	if (!child) {
		struct kdp_event ev;
		char c;

		if (read(go[0], &c, 1) != 1)
			_exit(1);
		if (read(s->vm, &ev, sizeof(ev)) != sizeof(ev) || ev.page != 5)
			_exit(2);
		_exit(kdp_mark(s->vm, 1, KDP_STATE_PRESENT, 5, 1).err);
	}
	close(self->vm);
	ASSERT_TRUE(toucher_start(&t, s->guest + 5 * PAGE, TOUCH_READ));
	ASSERT_TRUE(toucher_asleep(&t));
	ASSERT_EQ(1, write(go[1], "x", 1));
	EXPECT_EQ(0, child_status(child));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(6, t.val);
	self->vm = vm_open(_metadata);
}

TEST_F(lifetime, vm_closed_wakes_waiters_with_sigbus)
{
	struct slot *s = &self->s;
	struct toucher t[3] = { 0 };

	/* One whose event was read, one whose event was not, and a copy in the kernel. */
	wait_begins(_metadata, s, &t[0], 3, TOUCH_READ);
	wait_begins(_metadata, s, &t[1], 4, TOUCH_KERNEL);
	ASSERT_TRUE(toucher_start(&t[2], s->guest + 5 * PAGE, TOUCH_WRITE));
	ASSERT_TRUE(toucher_asleep(&t[2]));
	close(self->vm);
	for (int i = 0; i < 3; i++) {
		ASSERT_TRUE(toucher_join(&t[i]));
		EXPECT_EQ(i == 1 ? EFAULT : SIGBUS, t[i].result);
	}
	self->vm = vm_open(_metadata);
}

TEST_F(lifetime, vm_closed_fails_closed)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };
	unsigned char *late, val;

	EXPECT_MARK(2, s, KDP_STATE_PRESENT, 0, 2);
	EXPECT_BYTE(1, s->guest);
	close(self->vm);
	/* What is present stays; what is absent is an error for ever, never a page of zeros. */
	EXPECT_BYTE(1, s->guest);
	EXPECT_BYTE(2, s->guest + PAGE);
	for (__u64 page = 2; page < PAGES; page++) {
		EXPECT_EQ(SIGBUS, touch_read(s->guest + page * PAGE, &val));
		EXPECT_EQ(SIGBUS, touch_write(s->guest + page * PAGE, 1));
	}
	ASSERT_TRUE(toucher_start(&t, s->guest + 2 * PAGE, TOUCH_KERNEL));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(EFAULT, t.result);
	late = map(s->fd, PAGES * PAGE, PROT_READ | PROT_WRITE, 0);
	if (late != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch_read(late + 2 * PAGE, &val));
	}
	self->vm = vm_open(_metadata);
}

TEST_F(lifetime, mapping_survives_its_fds)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	close(s->fd);
	close(s->memfd);
	wait_begins(_metadata, s, &t, 7, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 7, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(8, t.val);
}

TEST_F(lifetime, mapping_goes_with_everything_closed)
{
	struct slot *s = &self->s;
	unsigned char val;

	EXPECT_MARK(PAGES, s, KDP_STATE_PRESENT, 0, PAGES);
	EXPECT_BYTE(1, s->guest);
	close(s->fd);
	close(s->memfd);
	ASSERT_EQ(0, munmap(s->alias, PAGES * PAGE));
	close(self->vm);
	/* Only the mapping holds the memslot now, and it works. */
	EXPECT_EQ(0, touch_write(s->guest, 0x11));
	EXPECT_EQ(0, touch_read(s->guest + (PAGES - 1) * PAGE, &val));
	EXPECT_EQ(PAGES, val);
	ASSERT_EQ(0, munmap(s->guest, PAGES * PAGE));
	self->vm = vm_open(_metadata);
}

TEST_F(lifetime, mremap_moves)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };
	unsigned char *to, *old = s->guest, val;

	EXPECT_MARK(4, s, KDP_STATE_PRESENT, 0, 4);
	EXPECT_BYTE(1, s->guest);
	EXPECT_BYTE(2, s->guest + PAGE);
	to = mmap(NULL, PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, to);
	s->guest = mremap(old, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	ASSERT_EQ(to, s->guest) TH_LOG("mremap: %s", strerror(errno));
	EXPECT_BYTE(1, s->guest);
	EXPECT_BYTE(3, s->guest + 2 * PAGE);
	EXPECT_EQ(SIGSEGV, touch_read(old, &val));
	/* The states go with it: what is made absent is unmapped at the new place. */
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 1, 1);
	wait_begins(_metadata, s, &t, 1, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 1, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(2, t.val);
	wait_begins(_metadata, s, &t, 60, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 60, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(61, t.val);
}

TEST_F(lifetime, mremap_shrinks_but_does_not_grow)
{
	struct slot *s = &self->s;
	unsigned char val;

	EXPECT_MARK(PAGES, s, KDP_STATE_PRESENT, 0, PAGES);
	ASSERT_EQ(s->guest, mremap(s->guest, PAGES * PAGE, 10 * PAGE, 0));
	EXPECT_BYTE(10, s->guest + 9 * PAGE);
	EXPECT_EQ(SIGSEGV, touch_read(s->guest + 10 * PAGE, &val));
	EXPECT_EQ(MAP_FAILED, mremap(s->guest, 10 * PAGE, 20 * PAGE, MREMAP_MAYMOVE));
	EXPECT_EQ(MAP_FAILED, mremap(s->guest, 10 * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE));
	EXPECT_BYTE(1, s->guest);
}

/* mremap(2) with an old size of 0 would make a second mapping; whatever it does, states hold. */
TEST_F(lifetime, mremap_duplicates)
{
	struct slot *s = &self->s, view = *s;
	struct toucher t = { 0 };
	unsigned char *twin = mremap(s->guest, 0, PAGES * PAGE, MREMAP_MAYMOVE);

	if (twin == MAP_FAILED)
		return;
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 2, 1);
	EXPECT_BYTE(3, twin + 2 * PAGE);
	EXPECT_MARK(1, s, KDP_STATE_ABSENT, 2, 1);
	view.guest = twin;
	wait_begins(_metadata, &view, &t, 2, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 2, 1);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(lifetime, partial_munmap)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };
	unsigned char val;

	EXPECT_MARK(40, s, KDP_STATE_PRESENT, 0, 40);
	for (int page = 0; page < 40; page++) {
		ASSERT_EQ(0, touch_read(s->guest + page * PAGE, &val));
	}
	ASSERT_EQ(0, munmap(s->guest + 20 * PAGE, 10 * PAGE));
	EXPECT_BYTE(20, s->guest + 19 * PAGE);
	EXPECT_BYTE(31, s->guest + 30 * PAGE);
	EXPECT_EQ(SIGSEGV, touch_read(s->guest + 20 * PAGE, &val));
	EXPECT_EQ(SIGSEGV, touch_read(s->guest + 29 * PAGE, &val));
	/* The upper part still names its pages right. */
	wait_begins(_metadata, s, &t, 45, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 45, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(46, t.val);
	EXPECT_MARK(2, s, KDP_STATE_ABSENT, 30, 2);
	wait_begins(_metadata, s, &t, 30, TOUCH_READ);
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 30, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(31, t.val);
}

TEST_F(lifetime, munmap_while_somebody_waits)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };

	wait_begins(_metadata, s, &t, 9, TOUCH_READ);
	/* The waiter holds no lock that munmap(2) needs; it finds its address gone. */
	ASSERT_EQ(0, munmap(s->guest, PAGES * PAGE));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 9, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(SIGSEGV, t.result);
}

/* A waiting thread must not hold up the address space: mmap, fork, /proc/self/maps go on. */
TEST_F(lifetime, waiter_holds_no_lock)
{
	struct slot *s = &self->s;
	struct toucher t = { 0 };
	char buf[256];
	pid_t child;
	void *p;
	int fd;

	wait_begins(_metadata, s, &t, 9, TOUCH_READ);
	p = map_rw(_metadata, s->fd, PAGE, 0);
	ASSERT_EQ(0, munmap(p, PAGE));
	ASSERT_EQ(0, mprotect(s->guest, PAGE, PROT_READ));
	ASSERT_EQ(0, mprotect(s->guest, PAGES * PAGE, PROT_READ | PROT_WRITE));
	child = fork();
	if (!child)
		_exit(0);
	EXPECT_EQ(0, child_status(child));
	fd = open("/proc/self/maps", O_RDONLY);
	EXPECT_LT(0, read(fd, buf, sizeof(buf)));
	close(fd);
	EXPECT_EQ(0, atomic_load(&t.done));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 9, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(10, t.val);
}

TEST_F(lifetime, killed_waiter_leaves_nothing)
{
	struct slot *s = &self->s;

	for (int i = 0; i < 20; i++) {
		pid_t child = fork();
		long long end = now_ms() + PATIENCE_MS;
		unsigned char val;

		if (!child)
			_exit(touch_read(s->guest + (3 + i) * PAGE, &val));
		event_read(_metadata, s->vm);
		ASSERT_EQ(0, kill(child, SIGKILL));
		while (waitpid(child, NULL, WNOHANG) != child) {
			ASSERT_LT(now_ms(), end) TH_LOG("a waiter cannot be killed");
			usleep(1000);
		}
	}
	EXPECT_FALSE(event_pending(s->vm, 0));
	EXPECT_MARK(1, s, KDP_STATE_PRESENT, 3, 1);
	EXPECT_BYTE(4, s->guest + 3 * PAGE);
}

TEST_F(lifetime, memslot_fd_after_vm_closed)
{
	struct slot *s = &self->s;

	close(self->vm);
	EXPECT_EQ(PAGES * PAGE, lseek(s->fd, 0, SEEK_END));
	EXPECT_EQ(ENOTTY, kdp_ioctl(s->fd, KDP_INFO, &KDP_ARG(kdp_info)));
	self->vm = vm_open(_metadata);
}

/* The module cannot go while a file or a mapping of it is there. */
static int try_rmmod(void)
{
	return syscall(SYS_delete_module, "kvm_demand_paging", O_NONBLOCK) ? errno : 0;
}

TEST(lifetime_rmmod_is_refused_while_in_use)
{
	static const char * const holders[] = {
		"the VM", "a memslot's fd", "a fd of its node", "a mapping of guest memory",
		"a mapping of the bitmap",
	};

	for (size_t i = 0; i < ARRAY_SIZE(holders); i++) {
		struct kdp_memslot_create arg = good_create(_metadata, 1, PAGES);
		void *guest = NULL, *bitmap = NULL;
		int vm = vm_open(_metadata), node = -1;

		memcpy(arg.name, "st-rmmod", 8);
		ASSERT_EQ(0, kdp_create(vm, &arg));
		EXPECT_EQ(0, kdp_mark(vm, 1, KDP_STATE_PRESENT, 0, PAGES).err);
		if (i == 2)
			node = open(KDP_MEMSLOT_DIR "/st-rmmod", O_RDWR | O_CLOEXEC);
		if (i == 3)
			guest = map_rw(_metadata, arg.fd, PAGE, 0);
		if (i == 4)
			bitmap = map_rw(_metadata, arg.fd, PAGE, KDP_BITMAP_OFFSET);
		if (i != 0)
			close(vm);
		if (i != 1)
			close(arg.fd);
		close(arg.memfd);
		ASSERT_NE(0, try_rmmod()) TH_LOG("the module went, while this was left: %s", holders[i]);
		if (guest) {
			*(volatile char *)guest = 1;
			munmap(guest, PAGE);
		}
		if (bitmap)
			munmap(bitmap, PAGE);
		if (i == 0)
			close(vm);
		if (i == 1)
			close(arg.fd);
		if (i == 2) {
			ASSERT_LE(0, node);
			close(node);
		}
	}
}
