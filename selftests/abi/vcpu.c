// SPDX-License-Identifier: GPL-2.0
/* KDP_VCPU_EXITS as a call; the exits themselves are tested with a guest elsewhere. */
#include "test.h"

#define PAGES	16

FIXTURE(vcpu) {
	int vm;
};

FIXTURE_SETUP(vcpu)
{
	struct kdp_info info;

	self->vm = vm_open(_metadata);
	ASSERT_EQ(0, kdp_info(self->vm, &info));
	if (!(info.features & KDP_FEATURE_EXITS))
		SKIP(return, "KVM is not loaded: KDP_INFO has no KDP_FEATURE_EXITS");
}

FIXTURE_TEARDOWN(vcpu)
{
	close(self->vm);
}

TEST_F(vcpu, exits_on_and_off)
{
	EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
	for (int i = 0; i < 3; i++) {
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
	}
}

TEST_F(vcpu, exits_ebusy_for_another_vm)
{
	int other = vm_open(_metadata);

	ASSERT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
	EXPECT_EQ(EBUSY, kdp_exits(other, KDP_EXITS_ON));
	ASSERT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
	EXPECT_EQ(0, kdp_exits(other, KDP_EXITS_ON));
	EXPECT_EQ(EBUSY, kdp_exits(self->vm, KDP_EXITS_ON));
	/* Closing the VM ends it. */
	close(other);
	EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
}

struct thread_exits {
	int vm;
	int err;
};

static void *exits_on(void *arg)
{
	struct thread_exits *t = arg;

	t->err = kdp_exits(t->vm, KDP_EXITS_ON);
	return NULL;
}

TEST_F(vcpu, exits_are_per_thread)
{
	struct thread_exits t = { .vm = vm_open(_metadata) };
	pthread_t thread;
	pid_t child;

	ASSERT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
	ASSERT_EQ(0, pthread_create(&thread, NULL, exits_on, &t));
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, t.err);
	/* A child is another thread: it does not inherit. */
	child = fork();
	if (!child)
		_exit(kdp_exits(t.vm, KDP_EXITS_ON));
	EXPECT_EQ(0, child_status(child));
	EXPECT_EQ(EBUSY, kdp_exits(t.vm, KDP_EXITS_ON));
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void *exits_on_and_stay(void *arg)
{
	atomic_int *count = ((void **)arg)[1];
	atomic_int *failed = ((void **)arg)[2];

	if (kdp_exits(*(int *)((void **)arg)[0], KDP_EXITS_ON))
		(*failed)++;
	(*count)++;
	pthread_mutex_lock(&gate);
	pthread_mutex_unlock(&gate);
	return NULL;
}

TEST_F(vcpu, exits_enospc)
{
	static pthread_t threads[KDP_MAX_VCPU_THREADS];
	atomic_int count = 0, failed = 0;
	void *arg[] = { &self->vm, &count, &failed };
	struct thread_exits t = { .vm = self->vm };
	pthread_attr_t attr;
	const char *kind = getenv("KDP_KERNEL");
	pthread_t thread;
	int made;

	if (kind && !strcmp(kind, "debug"))
		SKIP(return, "%d threads take minutes on the debug kernel; the fast one runs this",
		     KDP_MAX_VCPU_THREADS);
	ASSERT_EQ(0, pthread_attr_init(&attr));
	ASSERT_EQ(0, pthread_attr_setstacksize(&attr, 64 * 1024));
	pthread_mutex_lock(&gate);
	for (made = 0; made < KDP_MAX_VCPU_THREADS; made++)
		if (pthread_create(&threads[made], &attr, exits_on_and_stay, arg))
			break;
	while (count < made)
		usleep(1000);
	EXPECT_EQ(0, atomic_load(&failed));
	if (made == KDP_MAX_VCPU_THREADS) {
		EXPECT_EQ(ENOSPC, kdp_exits(self->vm, KDP_EXITS_ON));
		/* Off is no new one. */
		EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
	}
	pthread_mutex_unlock(&gate);
	for (int i = 0; i < made; i++)
		pthread_join(threads[i], NULL);
	if (made < KDP_MAX_VCPU_THREADS)
		SKIP(return, "this machine gives no more than %d threads", made);
	/* Threads that have ended count no more, whether they switched exits off or not. */
	ASSERT_EQ(0, pthread_create(&thread, NULL, exits_on, &t));
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, t.err);
}

static void *exits_on_then_touch(void *arg)
{
	struct slot *s = arg;
	unsigned char val = 0;
	int sig;

	if (kdp_exits(s->vm, KDP_EXITS_ON))
		return (void *)1000L;
	sig = touch_read(s->guest + PAGE, &val);
	return (void *)(long)(sig ?: val);
}

/* "All other accesses of the thread wait": its own, outside KVM_RUN. */
TEST_F(vcpu, own_access_of_an_exits_thread_waits)
{
	struct slot s = slot_new(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	pthread_t thread;
	struct kdp_event ev;
	void *result;

	ASSERT_EQ(0, pthread_create(&thread, NULL, exits_on_then_touch, &s));
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(1, ev.page);
	EXPECT_EQ(KDP_ACCESS_USER, ev.access);
	s.alias[PAGE] = 200;
	EXPECT_MARK(1, &s, KDP_STATE_PRESENT, 1, 1);
	ASSERT_EQ(0, pthread_join(thread, &result));
	EXPECT_EQ(200, (long)result);
}

/* The modules to unload for this, or NULL: who uses them. */
static const char *kvm_flavour(void)
{
	char line[512];
	const char *found = NULL;
	FILE *f = fopen("/proc/modules", "re");

	while (f && fgets(line, sizeof(line), f)) {
		if (!strncmp(line, "kvm_amd ", 8))
			found = "kvm_amd";
		if (!strncmp(line, "kvm_intel ", 10))
			found = "kvm_intel";
	}
	if (f)
		fclose(f);
	return found;
}

TEST_F(vcpu, eopnotsupp_without_kvm)
{
	struct thread_exits t = { .vm = self->vm };
	const char *flavour = kvm_flavour();
	struct kdp_info info;
	char command[64];
	pthread_t thread;

	if (!flavour)
		SKIP(return, "KVM is built in, or of a kind we do not know: it cannot be unloaded");
	/* It goes away under a thread that has exits on, too. */
	EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_ON));
	if (syscall(SYS_delete_module, flavour, O_NONBLOCK))
		SKIP(return, "%s cannot be unloaded: %s", flavour, strerror(errno));
	if (syscall(SYS_delete_module, "kvm", O_NONBLOCK)) {
		int err = errno;

		snprintf(command, sizeof(command), "modprobe %s", flavour);
		EXPECT_EQ(0, system(command));
		SKIP(return, "kvm cannot be unloaded: %s", strerror(err));
	}
	EXPECT_EQ(0, kdp_info(self->vm, &info));
	EXPECT_EQ(0, info.features & KDP_FEATURE_EXITS);
	ASSERT_EQ(0, pthread_create(&thread, NULL, exits_on, &t));
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(EOPNOTSUPP, t.err);
	snprintf(command, sizeof(command), "modprobe %s", flavour);
	ASSERT_EQ(0, system(command));
	EXPECT_EQ(0, kdp_info(self->vm, &info));
	EXPECT_EQ(KDP_FEATURE_EXITS, info.features & KDP_FEATURE_EXITS);
	ASSERT_EQ(0, pthread_create(&thread, NULL, exits_on, &t));
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, t.err);
	EXPECT_EQ(0, kdp_exits(self->vm, KDP_EXITS_OFF));
}
