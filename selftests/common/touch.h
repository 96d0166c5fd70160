/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Touching memory that may not be there: an access returns the signal that it
 * raised, and threads touch in the background.
 */
#ifndef KDP_SELFTESTS_TOUCH_H
#define KDP_SELFTESTS_TOUCH_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <time.h>

#include "kdp.h"

/* The SIGBUS or SIGSEGV of this thread goes there, once, while touch_armed is set. */
extern _Thread_local sigjmp_buf touch_env;
extern _Thread_local volatile sig_atomic_t touch_armed;
/* Called before a signal that no touch expected kills. */
extern void (*touch_unexpected)(int sig);

void touch_init(void);

/* 0, or the signal that the access got. */
int touch_read(const volatile void *p, unsigned char *val);
int touch_write(volatile void *p, unsigned char val);
/* An atomic OR on a word of the bitmap. */
int touch_or(atomic_ullong *p, __u64 bits);

long long now_ms(void);

enum touch_kind { TOUCH_READ, TOUCH_WRITE, TOUCH_KERNEL, TOUCH_TO_FILE, TOUCH_FROM_FILE };

/* A thread that accesses one byte, or does file I/O, and the result. */
struct toucher {
	pthread_t thread;
	volatile unsigned char *p;
	enum touch_kind kind;
	unsigned char val;	/* what it read, or is to write */
	int result;		/* 0 or a signal; for TOUCH_KERNEL and file I/O: 0 or an errno */
	int fd;			/* for file I/O; so are the next two */
	size_t bytes;
	off_t at;
	atomic_int tid;
	atomic_int done;
};

/* Generous: a debug kernel under emulation is slow. Never reached when all is well. */
#define PATIENCE_MS	20000
/* How long a thing that must not happen gets to happen. */
#define QUIET_MS	100

bool toucher_start(struct toucher *t, volatile void *p, enum touch_kind kind);
/* Wait until the thread sleeps, which for a toucher means: until it waits for its page. */
bool toucher_asleep(struct toucher *t);
/* False if it is not done within PATIENCE_MS. */
bool toucher_join(struct toucher *t);

#endif
