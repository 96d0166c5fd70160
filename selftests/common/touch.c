// SPDX-License-Identifier: GPL-2.0
/* See touch.h. */
#include "touch.h"

_Thread_local sigjmp_buf touch_env;
_Thread_local volatile sig_atomic_t touch_armed;

void (*touch_unexpected)(int sig);

atomic_ullong *kdp_ioctls;

static void touch_handler(int sig)
{
	if (touch_armed) {
		touch_armed = 0;
		siglongjmp(touch_env, sig);
	}
	if (touch_unexpected)
		touch_unexpected(sig);
	signal(sig, SIG_DFL);
}

void touch_init(void)
{
	struct sigaction sa = { .sa_handler = touch_handler };

	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL);
}

int touch_read(const volatile void *p, unsigned char *val)
{
	int sig = sigsetjmp(touch_env, 1);

	if (sig)
		return sig;
	touch_armed = 1;
	*val = *(const volatile unsigned char *)p;
	touch_armed = 0;
	return 0;
}

int touch_write(volatile void *p, unsigned char val)
{
	int sig = sigsetjmp(touch_env, 1);

	if (sig)
		return sig;
	touch_armed = 1;
	*(volatile unsigned char *)p = val;
	touch_armed = 0;
	return 0;
}

int touch_or(atomic_ullong *p, __u64 bits)
{
	int sig = sigsetjmp(touch_env, 1);

	if (sig)
		return sig;
	touch_armed = 1;
	atomic_fetch_or_explicit(p, bits, memory_order_release);
	touch_armed = 0;
	return 0;
}

long long now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000LL + ts.tv_nsec / 1000000;
}

static int file_result(struct toucher *t, ssize_t done)
{
	if (done < 0)
		return errno;
	return done == (ssize_t)t->bytes ? 0 : EIO;
}

static void *toucher_main(void *arg)
{
	struct toucher *t = arg;
	sigset_t set;
	int fds[2];

	/*
	 * glibc blocks all signals in a thread that forks. If the child ends at once, the kernel
	 * sends SIGCHLD to another thread (complete_signal() in kernel/signal.c). Do not take it:
	 * it would end this thread's wait.
	 */
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	t->tid = gettid();
	switch (t->kind) {
	case TOUCH_READ:
		t->result = touch_read(t->p, &t->val);
		break;
	case TOUCH_WRITE:
		t->result = touch_write(t->p, t->val);
		break;
	case TOUCH_KERNEL:
		/* write(2) makes the kernel read the byte. */
		if (pipe2(fds, O_CLOEXEC)) {
			t->result = errno;
			break;
		}
		t->result = write(fds[1], (void *)t->p, 1) == 1 ? 0 : errno;
		if (!t->result && read(fds[0], &t->val, 1) != 1)
			t->result = EIO;
		close(fds[0]);
		close(fds[1]);
		break;
	case TOUCH_TO_FILE:
		t->result = file_result(t, pwrite(t->fd, (void *)t->p, t->bytes, t->at));
		break;
	case TOUCH_FROM_FILE:
		t->result = file_result(t, pread(t->fd, (void *)t->p, t->bytes, t->at));
		break;
	}
	t->done = 1;
	return NULL;
}

bool toucher_start(struct toucher *t, volatile void *p, enum touch_kind kind)
{
	t->p = p;
	t->kind = kind;
	t->done = 0;
	t->tid = 0;
	if (pthread_create(&t->thread, NULL, toucher_main, t))
		return false;
	while (!t->tid)
		sched_yield();
	return true;
}

bool toucher_asleep(struct toucher *t)
{
	long long end = now_ms() + PATIENCE_MS;
	char path[64], state;
	int seen = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", t->tid);
	while (now_ms() < end && seen < 3) {
		f = fopen(path, "re");
		if (!f || fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
			state = 0;
		if (f)
			fclose(f);
		/* Several times in a row: a lock on the way is no wait. */
		seen = state == 'S' || state == 'D' ? seen + 1 : 0;
		usleep(2000);
	}
	return seen == 3;
}

bool toucher_join(struct toucher *t)
{
	long long end = now_ms() + PATIENCE_MS;

	while (!t->done && now_ms() < end)
		usleep(500);
	if (!t->done)
		return false;
	return pthread_join(t->thread, NULL) == 0;
}
