/* SPDX-License-Identifier: GPL-2.0 */
/* What the module should be doing: VMs, memslots, page states, the bytes of each page, who waits. */
#ifndef KDP_FUZZ_MODEL_H
#define KDP_FUZZ_MODEL_H

#include <poll.h>

#include "fuzz.h"

#define NR_MEMS		4
#define NR_VMS		2
#define NR_SLOTS	8
#define NR_WAITERS	4
#define MAX_PAGES	1024

/* A memfd. Of each page the first and the last 8 bytes are modelled. */
struct mem {
	int fd;
	__u64 pages;
	bool huge;
	bool sealed;	/* as a memslot needs it */
	unsigned char *alias;
	__u64 head[MAX_PAGES];
	__u64 tail[MAX_PAGES];
};

enum event { EV_NONE, EV_UNREAD, EV_READ, EV_UNKNOWN };

enum life {
	LIFE_NONE,
	LIFE_LISTED,	/* in its VM */
	LIFE_REMOVED,	/* by KDP_MEMSLOT_REMOVE; a mapping may be left */
	LIFE_ORPHAN,	/* its VM was closed; a mapping may be left */
};

struct mslot {
	enum life life;
	int vm;
	__u32 id;
	__u64 base, pages;
	struct mem *mem;
	__u64 first;		/* its page 0 in the memfd */
	bool paging;
	unsigned char state[MAX_PAGES];		/* KDP_STATE_*, while paging is on */
	unsigned char event[MAX_PAGES];		/* enum event */
	int fd;
	unsigned char *guest;
	atomic_ullong *bitmap;
	unsigned char *own;	/* a private mapping; NULL on hugetlb */
	bool copied[MAX_PAGES];			/* it was written there */
	__u64 own_head[MAX_PAGES];		/* of the pages that are copied */
	__u64 own_tail[MAX_PAGES];
	char name[KDP_NAME_LEN];
};

/* A block device. On direct I/O to it the kernel accesses guest memory. */
#define DISK_PAGES	64

struct disk {
	int fd;			/* for direct I/O; -1 if there is no loop device */
	unsigned char *bytes;	/* what the disk holds */
	char swap[32];		/* the path of another device, used as swap space */
	__u64 head[DISK_PAGES];
	__u64 tail[DISK_PAGES];
};

struct waiter {
	bool active;
	struct toucher t;
	struct mslot *s;
	__u64 page;
};

struct model {
	struct rng r;
	struct op_log log;
	bool failed;
	int vm[NR_VMS];
	int exits_vm;		/* the VM that this thread has exits on for, or -1 */
	struct mem mem[NR_MEMS];
	struct disk disk;
	struct mslot slot[NR_SLOTS];
	struct waiter waiter[NR_WAITERS];
};

/* The errnos that a call may end with; none means that it must succeed. */
struct errs {
	int n;
	int e[16];
};

static inline void may_fail(struct errs *errs, bool cond, int err)
{
	if (cond && errs->n < 16)
		errs->e[errs->n++] = err;
}

/* Say what went wrong, once: what follows it would follow from it. */
void model_fail(struct model *m, const char *fmt, ...) __printf(2, 3);

bool model_start(struct model *m, unsigned long long seed);
void model_stop(struct model *m);

/* Make a call, now and then with a size that is not its struct's, and check its errno. */
int model_call(struct model *m, const char *name, int fd, unsigned long cmd, void *arg,
	       __u32 size, struct errs *errs);

/* The memslot of this id that the VM has, or NULL. */
struct mslot *model_find(struct model *m, int vm, __u32 id);
bool model_has_waiter(struct model *m, struct mslot *s, __u64 page, bool any_page);

/* Touch a page and check what comes of it; it may begin to wait. */
void model_touch(struct model *m, struct mslot *s, __u64 page, enum touch_kind kind);
/* The module fills a page that is in the state zero. */
void model_zero_fill(struct mslot *s, __u64 page);
/* After a change of states: those who must go on have gone on, with the right byte. */
void model_settle(struct model *m);

/* Give back a memslot that is no longer in a VM. */
void model_forget(struct model *m, struct mslot *s);

/* A memslot that is no further gone than this, or NULL. */
struct mslot *any_slot(struct model *m, enum life at_most);
/* An id that mostly exists. */
__u32 some_id(struct model *m);
/* Flags that are mostly known ones. */
__u32 some_flags(struct model *m, __u32 known, struct errs *errs);

/* The ops on whole memslots and VMs (objects.c); those on pages are in sequential.c. */
void op_create(struct model *m);
void op_remove(struct model *m);
void op_get(struct model *m);
void op_paging(struct model *m);
void op_close_vm(struct model *m);
void op_forget(struct model *m);

/* The disk and the swap space, if the kernel has loop devices (direct.c). */
void disk_start(struct model *m);
void disk_stop(struct model *m);
void op_direct(struct model *m);

/* The result of an access to a page. */
enum outcome {
	WAITS,
	FAILS,
	WORKS,
	FILLS,			/* the module fills the page with zeros; the access works */
};

enum outcome model_outcome(const struct mslot *s, __u64 page, bool own);
/* Whether the first word of the page at @p is @head, and its last word is @tail. */
bool model_holds(const unsigned char *p, __u64 head, __u64 tail);

/* The ops on shmem that is the kernel's ordinary memory (native.c). */
void op_private(struct model *m);
void op_fork(struct model *m);
void op_advise(struct model *m);

#endif
