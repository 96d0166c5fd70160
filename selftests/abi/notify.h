/* SPDX-License-Identifier: GPL-2.0 */
/* A VM with one memslot, and threads that touch it: for the tests of the notification fd. */
#ifndef KDP_SELFTESTS_NOTIFY_H
#define KDP_SELFTESTS_NOTIFY_H

#include "test.h"

#define PAGES	64
#define EV	sizeof(struct kdp_event)

FIXTURE(notify) {
	int vm;
	struct slot s;
	struct toucher t[8];
	int touchers;
};

FIXTURE_SETUP(notify)
{
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 9, PAGES, KDP_MEMSLOT_PAGING);
}

/* Whatever was lost or not: all are woken in the end. */
FIXTURE_TEARDOWN(notify)
{
	EXPECT_EQ(0, kdp_mark(self->vm, 9, KDP_STATE_PRESENT, 0, PAGES).err);
	for (int i = 0; i < self->touchers; i++) {
		EXPECT_TRUE(toucher_join(&self->t[i]));
	}
	close(self->vm);
}

static inline struct toucher *touch(struct __test_metadata *_metadata, struct _test_data_notify *self,
			     __u64 page, enum touch_kind kind)
{
	struct toucher *t = &self->t[self->touchers++];

	ASSERT_TRUE(toucher_start(t, self->s.guest + page * PAGE, kind));
	return t;
}

/* All who were started sleep now: in the module, for they do nothing else. */
static inline void all_wait(struct __test_metadata *_metadata, struct _test_data_notify *self)
{
	for (int i = 0; i < self->touchers; i++) {
		ASSERT_TRUE(toucher_asleep(&self->t[i]));
	}
}

static inline void nonblocking(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Touch a page and wait until its event can be read, without reading it. */
static inline struct toucher *touch_queued(struct __test_metadata *_metadata, struct _test_data_notify *self,
				    __u64 page, enum touch_kind kind)
{
	struct toucher *t = touch(_metadata, self, page, kind);

	ASSERT_TRUE(event_pending(self->vm, PATIENCE_MS));
	return t;
}

/* A thread that reads one event; it ends with read(2)'s result or its errno, negative. */
static inline void *blocked_reader(void *arg)
{
	struct kdp_event ev;
	ssize_t got = read(*(int *)arg, &ev, EV);

	return (void *)(long)(got < 0 ? -errno : got);
}

#endif
