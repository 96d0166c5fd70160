/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Several processes and threads at once.
 *
 * Two kinds of memslots. *Checked* ones have one owner thread, which alone
 * changes their states and knows them all; everybody touches them and must
 * find what the owner put there, never what lies in the memfd while a page is
 * absent. With all others everybody does everything: there only errnos and
 * signals are checked, and that the kernel lives.
 */
#ifndef KDP_FUZZ_CONCURRENT_H
#define KDP_FUZZ_CONCURRENT_H

#include <poll.h>
#include <sys/wait.h>

#include "fuzz.h"

#define NR_VMS		2
#define NR_CHECKED	3
#define MAX_TASKS	(64 * 64)

/* Chaos has these ids; checked memslots are 0, 1, 2. */
#define CHAOS_ID	100
#define CHAOS_IDS	8

struct checked {
	int vm;
	__u32 id;
	__u64 pages;
	bool zeros;		/* its pages are sometimes in the state zero */
	int memfd;
	unsigned char *alias;
	unsigned char *guest;
	unsigned char *own;	/* each process's private mapping; NULL on hugetlb */
	atomic_ullong *bitmap;
};

/* Seen by all processes. */
struct shared {
	struct options opt;
	int vm[NR_VMS];
	int chaos_memfd[3];
	struct checked checked[NR_CHECKED];
	atomic_ullong ops;
	atomic_ullong ioctls;
	atomic_int stop;
	atomic_int failed;
	char message[256];
	/* Each thread that touches a checked page right now. */
	atomic_uchar touching[MAX_TASKS];
};

/* A thread that does random things. */
struct task {
	struct shared *sh;
	struct rng r;
	struct op_log log;
	unsigned int index;
};

/* The first failure counts; everybody stops. */
void concurrent_fail(struct shared *sh, const struct op_log *log, const char *fmt, ...)
	__printf(3, 4);

/* The owner's thread of a checked memslot. */
struct owner {
	struct shared *sh;
	struct checked *c;
	struct rng r;
	struct op_log log;
	pthread_t thread;
};

void *owner_main(void *arg);
/* Touch a page of a checked memslot and look at what it holds. */
void checked_touch(struct task *t);

/* One random thing with the memslots that are not checked. */
void chaos_op(struct task *t);

#endif
