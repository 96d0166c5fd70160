// SPDX-License-Identifier: GPL-2.0
/* read(2) and poll(2) on the VM's fd: events, their fields, and each error. */
#include "notify.h"

#include <sys/epoll.h>

#define WHO	(KDP_ACCESS_USER | KDP_ACCESS_KERNEL | KDP_ACCESS_GUEST)

TEST_F(notify, event_fields)
{
	static const struct { enum touch_kind kind; __u32 who, write; } kinds[] = {
		{ TOUCH_READ, KDP_ACCESS_USER, 0 },
		{ TOUCH_WRITE, KDP_ACCESS_USER, KDP_ACCESS_WRITE },
		{ TOUCH_KERNEL, KDP_ACCESS_KERNEL, 0 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
		__u64 page = 20 + i;
		struct toucher *t = touch_queued(_metadata, self, page, kinds[i].kind);
		struct kdp_event ev;

		memset(&ev, 0xa5, sizeof(ev));
		ASSERT_EQ(EV, read(self->vm, &ev, EV));
		EXPECT_EQ(KDP_EVENT_ABSENT, ev.type);
		EXPECT_EQ(9, ev.slot_id);
		EXPECT_EQ(page, ev.page);
		EXPECT_EQ(slot_base(9) + page, ev.gfn);
		EXPECT_EQ(kinds[i].who, ev.access & WHO);
		EXPECT_EQ(kinds[i].write, ev.access & ~WHO);
		EXPECT_EQ(atomic_load(&t->tid), ev.tid);
		EXPECT_EQ(1, ev.waiters);
		EXPECT_EQ(1, ev.deliveries);
		EXPECT_EQ(0, ev.__reserved);
	}
}

TEST_F(notify, kernel_write_is_a_write)
{
	int fds[2];
	pid_t child;
	struct kdp_event ev;

	ASSERT_EQ(0, pipe2(fds, O_CLOEXEC));
	ASSERT_EQ(1, write(fds[1], "k", 1));
	child = fork();
	if (!child)
		_exit(read(fds[0], self->s.guest + 5 * PAGE, 1) != 1);
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(KDP_ACCESS_KERNEL | KDP_ACCESS_WRITE, ev.access);
	EXPECT_EQ(child, ev.tid);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 5, 1);
	EXPECT_EQ(0, child_status(child));
	EXPECT_EQ('k', self->s.alias[5 * PAGE]);
}

TEST_F(notify, one_event_per_page_however_many_wait)
{
	struct kdp_event ev;

	nonblocking(self->vm);
	for (int i = 0; i < 5; i++)
		touch(_metadata, self, 7, i % 2 ? TOUCH_KERNEL : TOUCH_READ);
	all_wait(_metadata, self);
	ASSERT_EQ(EV, read(self->vm, &ev, EV));
	EXPECT_EQ(7, ev.page);
	EXPECT_EQ(5, ev.waiters);
	EXPECT_EQ(-1, read(self->vm, &ev, EV));
	EXPECT_EQ(EAGAIN, errno);
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 7, 1);
	for (int i = 0; i < 5; i++) {
		ASSERT_TRUE(toucher_join(&self->t[i]));
	}
	self->touchers = 0;
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
}

TEST_F(notify, late_waiter_makes_no_second_event)
{
	struct kdp_event ev;

	nonblocking(self->vm);
	touch_queued(_metadata, self, 7, TOUCH_READ);
	ASSERT_EQ(EV, read(self->vm, &ev, EV));
	touch(_metadata, self, 7, TOUCH_WRITE);
	all_wait(_metadata, self);
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 7, 1);
}

TEST_F(notify, short_buffer_is_einval_and_loses_nothing)
{
	char buf[EV];
	struct kdp_event ev;

	/* Whether there is an event or not: no such buffer can ever be served. */
	for (size_t len = 0; len < EV; len++) {
		EXPECT_EQ(-1, read(self->vm, buf, len));
		EXPECT_EQ(EINVAL, errno);
	}
	touch_queued(_metadata, self, 1, TOUCH_READ);
	for (size_t len = 0; len < EV; len++) {
		EXPECT_EQ(-1, read(self->vm, buf, len));
		EXPECT_EQ(EINVAL, errno);
	}
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(1, ev.page);
	EXPECT_EQ(1, ev.deliveries);
}

TEST_F(notify, whole_events_only)
{
	struct kdp_event ev[8];
	ssize_t got;
	__u64 seen = 0;

	for (__u64 page = 0; page < 3; page++)
		touch(_metadata, self, page, TOUCH_READ);
	all_wait(_metadata, self);
	/* Room for two and a half. */
	got = read(self->vm, ev, 2 * EV + EV / 2);
	EXPECT_EQ(2 * EV, got);
	for (size_t i = 0; i < got / EV; i++)
		seen |= 1 << ev[i].page;
	got = read(self->vm, ev, sizeof(ev));
	EXPECT_EQ(EV, got);
	seen |= 1 << ev[0].page;
	EXPECT_EQ(7, seen);
}

TEST_F(notify, eagain)
{
	struct kdp_event ev;

	nonblocking(self->vm);
	EXPECT_EQ(-1, read(self->vm, &ev, EV));
	EXPECT_EQ(EAGAIN, errno);
	touch_queued(_metadata, self, 1, TOUCH_READ);
	EXPECT_EQ(EV, read(self->vm, &ev, EV));
	EXPECT_EQ(-1, read(self->vm, &ev, EV));
	EXPECT_EQ(EAGAIN, errno);
}

TEST_F(notify, efault_loses_nothing)
{
	unsigned char *two = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kdp_event ev;
	ssize_t got;

	ASSERT_NE(MAP_FAILED, two);
	ASSERT_EQ(0, mprotect(two + PAGE, PAGE, PROT_NONE));
	touch_queued(_metadata, self, 11, TOUCH_READ);
	for (size_t there = 0; there < EV; there += 8) {
		EXPECT_EQ(-1, read(self->vm, two + PAGE - there, EV));
		EXPECT_EQ(EFAULT, errno);
	}
	EXPECT_EQ(-1, read(self->vm, (void *)8, EV));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_TRUE(event_pending(self->vm, 0));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(11, ev.page);
	EXPECT_EQ(1, ev.deliveries) TH_LOG("what could not be written was counted as read");

	/* Two events, a buffer whose second half is not there: whatever it does, both arrive once. */
	for (__u64 page = 12; page < 14; page++)
		touch(_metadata, self, page, TOUCH_READ);
	all_wait(_metadata, self);
	__u64 seen = 0;

	got = read(self->vm, two + PAGE - EV, 2 * EV);
	EXPECT_TRUE(got == (ssize_t)EV || (got < 0 && errno == EFAULT));
	if (got > 0) {
		memcpy(&ev, two + PAGE - EV, EV);
		seen |= 1ULL << ev.page;
	}
	while (seen != (3ULL << 12)) {
		ev = event_read(_metadata, self->vm);
		EXPECT_EQ(1, ev.deliveries);
		EXPECT_FALSE(seen & 1ULL << ev.page);
		seen |= 1ULL << ev.page;
	}
}

static atomic_int signals;

static void on_signal(int sig)
{
	(void)sig;
	signals++;
}

TEST_F(notify, eintr)
{
	struct sigaction sa = { .sa_handler = on_signal };
	pthread_t reader;
	void *result;

	ASSERT_EQ(0, sigaction(SIGUSR1, &sa, NULL));
	ASSERT_EQ(0, pthread_create(&reader, NULL, blocked_reader, &self->vm));
	usleep(QUIET_MS * 1000);
	ASSERT_EQ(0, pthread_kill(reader, SIGUSR1));
	ASSERT_EQ(0, pthread_join(reader, &result));
	EXPECT_EQ(-EINTR, (long)result);
}

TEST_F(notify, read_blocks_until_an_event)
{
	pthread_t reader;
	void *result;

	ASSERT_EQ(0, pthread_create(&reader, NULL, blocked_reader, &self->vm));
	usleep(QUIET_MS * 1000);
	EXPECT_EQ(EBUSY, pthread_tryjoin_np(reader, NULL));
	touch(_metadata, self, 2, TOUCH_READ);
	ASSERT_EQ(0, pthread_join(reader, &result));
	EXPECT_EQ(EV, (long)result);
}

TEST_F(notify, poll_states)
{
	struct pollfd pfd = { .fd = self->vm, .events = POLLIN | POLLRDNORM };
	struct toucher *t;
	struct kdp_event ev;

	EXPECT_EQ(0, poll(&pfd, 1, 0));
	t = touch_queued(_metadata, self, 3, TOUCH_READ);
	ASSERT_EQ(1, poll(&pfd, 1, 0));
	EXPECT_EQ(POLLIN | POLLRDNORM, pfd.revents);
	/* Looking does not take it away. */
	EXPECT_EQ(1, poll(&pfd, 1, 0));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(3, ev.page);
	EXPECT_EQ(0, poll(&pfd, 1, 0));
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 3, 1);
	ASSERT_TRUE(toucher_join(t));
	self->touchers = 0;
	/* Resolved before it was read: there is nothing to tell any more. */
	t = touch_queued(_metadata, self, 4, TOUCH_READ);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 4, 1);
	ASSERT_TRUE(toucher_join(t));
	self->touchers = 0;
	EXPECT_EQ(0, poll(&pfd, 1, QUIET_MS));
}

TEST_F(notify, poll_wakes)
{
	struct pollfd pfd = { .fd = self->vm, .events = POLLIN };
	pid_t child;
	struct kdp_event ev;

	/* The touch begins after we sleep in poll(2), or just before: either way it ends. */
	child = fork();
	if (!child) {
		unsigned char val;

		usleep(QUIET_MS * 1000);
		_exit(touch_read(self->s.guest + 6 * PAGE, &val));
	}
	EXPECT_EQ(1, poll(&pfd, 1, PATIENCE_MS));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(6, ev.page);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 6, 1);
	EXPECT_EQ(0, child_status(child));
}

TEST_F(notify, epoll_edge_triggered)
{
	int ep = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event want = { .events = EPOLLIN | EPOLLET }, got;
	struct kdp_event ev;

	ASSERT_LE(0, ep);
	ASSERT_EQ(0, epoll_ctl(ep, EPOLL_CTL_ADD, self->vm, &want));
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	for (__u64 page = 0; page < 4; page++) {
		touch(_metadata, self, page, TOUCH_READ);
		EXPECT_EQ(1, epoll_wait(ep, &got, 1, PATIENCE_MS)) TH_LOG("page %llu", page);
	}
	for (int i = 0; i < 4; i++)
		ev = event_read(_metadata, self->vm);
	EXPECT_EQ(1, ev.deliveries);
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
}

/* A plain signal reaches a thread that waits in user mode; afterwards it waits on. */
TEST_F(notify, signal_reaches_a_waiting_thread)
{
	struct sigaction sa = { .sa_handler = on_signal };
	struct toucher *t;
	struct kdp_event ev;

	ASSERT_EQ(0, sigaction(SIGUSR1, &sa, NULL));
	t = touch_queued(_metadata, self, 50, TOUCH_READ);
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(50, ev.page);
	ASSERT_EQ(0, pthread_kill(t->thread, SIGUSR1));
	long long end = now_ms() + PATIENCE_MS;

	while (!signals) {
		ASSERT_LT(now_ms(), end) TH_LOG("the handler does not run while the thread waits");
		usleep(1000);
	}
	/* It touches again and waits again, and is not told of again: the first event is being served. */
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_EQ(0, atomic_load(&t->done));
	self->s.alias[50 * PAGE] = 0x50;
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 50, 1);
	ASSERT_TRUE(toucher_join(t));
	self->touchers = 0;
	EXPECT_EQ(0x50, t->val);
}

/*
 * In the kernel a thread cannot take a plain signal before its copy is done:
 * it waits on, and does neither spin nor ask again.
 */
TEST_F(notify, signal_to_a_waiting_system_call)
{
	struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	struct toucher *t;
	struct kdp_event ev;

	ASSERT_EQ(0, sigaction(SIGUSR1, &sa, NULL));
	t = touch_queued(_metadata, self, 51, TOUCH_KERNEL);
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(51, ev.page);
	for (int i = 0; i < 3; i++) {
		ASSERT_EQ(0, pthread_kill(t->thread, SIGUSR1));
		EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	}
	EXPECT_TRUE(toucher_asleep(t));
	EXPECT_EQ(0, atomic_load(&t->done));
	self->s.alias[51 * PAGE] = 0x51;
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 51, 1);
	ASSERT_TRUE(toucher_join(t));
	self->touchers = 0;
	EXPECT_EQ(0, t->result);
	EXPECT_EQ(0x51, t->val);
	EXPECT_LT(0, atomic_load(&signals));
}

TEST_F(notify, read_of_a_memslot_is_einval)
{
	char buf[2 * EV];

	EXPECT_EQ(-1, read(self->s.fd, buf, sizeof(buf)));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(-1, read(self->s.fd, buf, 1));
	EXPECT_EQ(EINVAL, errno);
}
