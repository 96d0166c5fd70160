// SPDX-License-Identifier: GPL-2.0
/* Invariant 4: events and those who read them; none is lost, none comes twice without a reason. */
#include "notify.h"

TEST_F(notify, event_goes_with_its_last_waiter)
{
	struct kdp_event ev;
	unsigned char val;
	pid_t child;

	nonblocking(self->vm);
	/* First one that nobody has read, then one that its reader is still to answer. */
	for (int was_read = 0; was_read < 2; was_read++) {
		child = fork();
		if (!child)
			_exit(touch_read(self->s.guest + 8 * PAGE, &val));
		ASSERT_TRUE(event_pending(self->vm, PATIENCE_MS));
		if (was_read) {
			EXPECT_EQ(EV, read(self->vm, &ev, EV));
			EXPECT_EQ(8, ev.page);
			EXPECT_EQ(1, ev.deliveries);
		}
		ASSERT_EQ(0, kill(child, SIGKILL));
		EXPECT_EQ(1000 + SIGKILL, child_status(child));
		EXPECT_FALSE(event_pending(self->vm, 0));
		EXPECT_EQ(-1, read(self->vm, &ev, EV));
		EXPECT_EQ(EAGAIN, errno);
	}
	/* What was read is not reported twice: the page would be filled twice. */
	touch(_metadata, self, 8, TOUCH_READ);
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, 8, 1).err);
}

/* Invariant 4: what was read but not resolved is delivered again. */
TEST_F(notify, redelivery_when_the_reader_dies)
{
	struct kdp_event ev;
	pid_t child;

	touch_queued(_metadata, self, 15, TOUCH_READ);
	for (__u32 round = 1; round <= 3; round++) {
		child = fork();
		if (!child) {
			if (read(self->vm, &ev, EV) != (ssize_t)EV || ev.deliveries != round)
				_exit(1);
			if (round % 2)
				kill(getpid(), SIGKILL);
			_exit(0);
		}
		EXPECT_EQ(round % 2 ? 1000 + SIGKILL : 0, child_status(child));
		EXPECT_TRUE(event_pending(self->vm, PATIENCE_MS));
	}
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(15, ev.page);
	EXPECT_EQ(4, ev.deliveries);
	EXPECT_EQ(1, ev.waiters);
}

TEST_F(notify, redelivery_when_the_reader_closes)
{
	int go[2], ready[2];
	struct kdp_event ev;
	pid_t child;
	char c;

	ASSERT_EQ(0, pipe2(go, O_CLOEXEC));
	ASSERT_EQ(0, pipe2(ready, O_CLOEXEC));
	touch_queued(_metadata, self, 16, TOUCH_READ);
	child = fork();
	if (!child) {
		if (read(self->vm, &ev, EV) != (ssize_t)EV)
			_exit(1);
		if (write(ready[1], "r", 1) != 1 || read(go[0], &c, 1) != 1)
			_exit(2);
		close(self->vm);
		if (write(ready[1], "c", 1) != 1 || read(go[0], &c, 1) != 1)
			_exit(3);
		_exit(0);
	}
	ASSERT_EQ(1, read(ready[0], &c, 1));
	/* As long as its reader has it, nobody else gets it. */
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	ASSERT_EQ(1, write(go[1], "x", 1));
	ASSERT_EQ(1, read(ready[0], &c, 1));
	EXPECT_TRUE(event_pending(self->vm, PATIENCE_MS));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(16, ev.page);
	EXPECT_EQ(2, ev.deliveries);
	ASSERT_EQ(1, write(go[1], "x", 1));
	EXPECT_EQ(0, child_status(child));
	/* Its death is no news: it had closed, and the event is ours. */
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
}

TEST_F(notify, no_redelivery_while_the_process_lives)
{
	pthread_t reader;
	void *result;
	pid_t child;

	/* A thread reads and ends; its process is alive. */
	ASSERT_EQ(0, pthread_create(&reader, NULL, blocked_reader, &self->vm));
	touch(_metadata, self, 17, TOUCH_READ);
	ASSERT_EQ(0, pthread_join(reader, &result));
	EXPECT_EQ(EV, (long)result);
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	/* Another process that had the fd, and read nothing, ends. */
	child = fork();
	if (!child)
		_exit(0);
	EXPECT_EQ(0, child_status(child));
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
}

TEST_F(notify, resolved_events_are_not_redelivered)
{
	struct toucher *t = touch_queued(_metadata, self, 18, TOUCH_READ);
	struct kdp_event ev;
	pid_t child = fork();

	if (!child) {
		if (read(self->vm, &ev, EV) != (ssize_t)EV)
			_exit(1);
		_exit(kdp_mark(self->vm, 9, KDP_STATE_PRESENT, ev.page, 1).err);
	}
	EXPECT_EQ(0, child_status(child));
	ASSERT_TRUE(toucher_join(t));
	self->touchers = 0;
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
}

/* The reader's buffer is itself guest memory that has to be fetched. */
TEST_F(notify, buffer_in_absent_page)
{
	struct kdp_event ev, *buf = (struct kdp_event *)(self->s.guest + 30 * PAGE);
	pid_t child;

	touch_queued(_metadata, self, 31, TOUCH_READ);
	child = fork();
	if (!child)
		_exit(read(self->vm, buf, EV) != (ssize_t)EV);
	/*
	 * We resolve what we are told of. When it was we who got the event that the
	 * child was to get, it needs another one, until one is on its way into the
	 * child's buffer: then we are told of that page.
	 */
	for (__u64 page = 32; page < 32 + 6; page++) {
		usleep(QUIET_MS * 1000);
		ev = event_read(_metadata, self->vm);
		EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, ev.page, 1).err);
		if (ev.page == 30)
			break;
		touch(_metadata, self, page, TOUCH_READ);
	}
	EXPECT_EQ(30, ev.page);
	long long end = now_ms() + PATIENCE_MS;
	int status = -1;

	while (waitpid(child, &status, WNOHANG) != child) {
		ASSERT_LT(now_ms(), end) TH_LOG("the reader hangs in its own buffer");
		usleep(1000);
	}
	EXPECT_EQ(0, status);
}

TEST_F(notify, tid_is_zero_where_the_thread_is_not_visible)
{
	struct toucher *t = touch_queued(_metadata, self, 40, TOUCH_READ);
	struct kdp_event ev;
	pid_t child = fork();

	(void)t;
	if (!child) {
		/* The grandchild lives in a pid namespace of its own. */
		if (unshare(CLONE_NEWPID))
			_exit(10 + errno);
		child = fork();
		if (!child) {
			if (read(self->vm, &ev, EV) != (ssize_t)EV)
				_exit(1);
			_exit(ev.page == 40 && ev.tid == 0 ? 0 : 2);
		}
		_exit(child_status(child));
	}
	EXPECT_EQ(0, child_status(child));
}

TEST_F(notify, write_is_refused)
{
	struct kdp_event ev = { .type = KDP_EVENT_ABSENT };

	EXPECT_EQ(-1, write(self->vm, &ev, EV));
	EXPECT_EQ(-1, write(self->s.fd, &ev, EV));
	EXPECT_EQ(-1, read(self->s.fd, &ev, EV));
}

TEST_F(notify, events_of_all_memslots_come_through_one_fd)
{
	struct slot other = slot_new(_metadata, self->vm, 2, PAGES, KDP_MEMSLOT_PAGING);
	struct kdp_event a, b;
	struct toucher t = { 0 };

	touch_queued(_metadata, self, 1, TOUCH_READ);
	a = event_read(_metadata, self->vm);
	ASSERT_TRUE(toucher_start(&t, other.guest + PAGE, TOUCH_READ));
	b = event_read(_metadata, self->vm);
	EXPECT_EQ(9, a.slot_id);
	EXPECT_EQ(2, b.slot_id);
	EXPECT_EQ(slot_base(2) + 1, b.gfn);
	/* Resolving the one does not resolve the other. */
	EXPECT_MARK(1, &other, KDP_STATE_PRESENT, 1, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, atomic_load(&self->t[0].done));
}

TEST_F(notify, vms_do_not_mix)
{
	int other_vm = vm_open(_metadata);
	struct slot other = slot_new(_metadata, other_vm, 9, PAGES, KDP_MEMSLOT_PAGING);

	touch_queued(_metadata, self, 1, TOUCH_READ);
	EXPECT_FALSE(event_pending(other_vm, QUIET_MS));
	EXPECT_MARK(1, &other, KDP_STATE_PRESENT, 1, 1);
	EXPECT_EQ(0, atomic_load(&self->t[0].done));
	close(other_vm);
}

#define ROUNDS	1500

struct runner {
	struct slot *s;
	atomic_int at;	/* the round that it is about to touch, from 1 */
};

static void *run_through(void *arg)
{
	struct runner *r = arg;
	unsigned char val;

	for (int i = 0; i < ROUNDS; i++) {
		r->at = i + 1;
		if (touch_read(r->s->guest + (i % PAGES) * PAGE, &val))
			return (void *)1L;
	}
	r->at = ROUNDS + 1;
	return NULL;
}

/* Invariant 3: a page is marked just when somebody begins to wait for it, and he does not sleep on. */
TEST_F(notify, no_wake_up_is_lost)
{
	struct runner r = { .s = &self->s };
	unsigned int delay = 1;
	pthread_t thread;
	void *result;

	ASSERT_EQ(0, pthread_create(&thread, NULL, run_through, &r));
	for (int i = 0; i < ROUNDS; i++) {
		long long end = now_ms() + PATIENCE_MS;

		while (r.at != i + 1)
			;
		/* Every moment of the fault gets its turn. */
		delay = delay * 1103515245 + 12345;
		for (volatile unsigned int n = (delay >> 16) % 4000; n; n--)
			;
		if (i % 3 == 0)
			bit_set(self->s.bitmap, i % PAGES);
		EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, i % PAGES, 1).err);
		while (r.at == i + 1) {
			ASSERT_LT(now_ms(), end) TH_LOG("in round %d somebody sleeps on", i);
			sched_yield();
		}
		/* Absent again before it comes round to it. */
		EXPECT_MARK(1, &self->s, KDP_STATE_ABSENT, i % PAGES, 1);
	}
	ASSERT_EQ(0, pthread_join(thread, &result));
	EXPECT_EQ(NULL, result);
}
