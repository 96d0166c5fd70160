// SPDX-License-Identifier: GPL-2.0
/* What the kernel does with ordinary memory: private mappings, fork, advice. */
#include <sys/mman.h>
#include <sys/wait.h>

#include "model.h"

static __u64 with_low_byte(__u64 word, unsigned char byte)
{
	return (word & ~0xffULL) | byte;
}

/* What was written to the private mapping is there, whatever became of the memslot's page. */
static bool copy_is_right(struct mslot *s, __u64 page)
{
	return model_holds(s->own + page * PAGE, s->own_head[page], s->own_tail[page]);
}

/* A touch of the private mapping. Who writes copies the page first. */
void op_private(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	bool writes = chance(&m->r, 50);
	enum outcome outcome;
	unsigned char val = rng_next(&m->r);
	__u64 page, at;
	int sig;

	if (!s || !s->own)
		return;
	page = pick(&m->r, s->pages);
	at = s->first + page;
	outcome = model_outcome(s, page, true);
	/* op_touch() tests accesses that wait. */
	if (outcome == WAITS)
		return;
	log_op(&m->log, writes ? "write private" : "read private", s->vm, s->id, page, s->life,
	       s->copied[page]);
	sig = writes ? touch_write(s->own + page * PAGE, val) :
		       touch_read(s->own + page * PAGE, &val);
	log_result(&m->log, sig);
	/* When the VM is closed, an access to a zero page may work or fail. */
	if (outcome == FILLS && s->life == LIFE_ORPHAN && sig == SIGBUS)
		return;
	if (sig != (outcome == FAILS ? SIGBUS : 0))
		model_fail(m, "touching slot %u page %llu privately gave signal %d", s->id, page,
			   sig);
	if (outcome == FAILS || m->failed)
		return;
	if (outcome == FILLS)
		model_zero_fill(s, page);
	if (writes && !s->copied[page]) {
		s->copied[page] = true;
		s->own_head[page] = s->mem->head[at];
		s->own_tail[page] = s->mem->tail[at];
	}
	if (writes)
		s->own_head[page] = with_low_byte(s->own_head[page], val);
	if (s->copied[page] ? !copy_is_right(s, page) :
	    !model_holds(s->own + page * PAGE, s->mem->head[at], s->mem->tail[at]))
		model_fail(m, "slot %u page %llu is wrong in the private mapping", s->id, page);
}

/* A child has the same memory, but what it writes to the private mapping is its own. */
static bool child_is_right(struct model *m, struct mslot *s)
{
	for (__u64 page = 0; page < s->pages; page += 1 + pick(&m->r, 8)) {
		unsigned char *p = s->own + page * PAGE, val = rng_next(&m->r);
		__u64 at = s->first + page;

		if (s->copied[page]) {
			if (!copy_is_right(s, page) || touch_write(p, val))
				return false;
			s->own_head[page] = with_low_byte(s->own_head[page], val);
			if (!copy_is_right(s, page))
				return false;
		} else if (s->life != LIFE_REMOVED &&
			   (!s->paging || s->state[page] == KDP_STATE_PRESENT)) {
			if (!model_holds(s->guest + page * PAGE, s->mem->head[at], s->mem->tail[at]) ||
			    !model_holds(p, s->mem->head[at], s->mem->tail[at]))
				return false;
		}
	}
	return true;
}

void op_fork(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	int status = -1;
	pid_t child;

	/* It is slow: seldom. */
	if (!s || !s->own || !chance(&m->r, 30))
		return;
	log_op(&m->log, "fork", s->vm, s->id, s->life, 0, 0);
	child = fork();
	if (!child) {
		/* It waits for nothing; if it does all the same, it does not stay. */
		alarm(PATIENCE_MS / 1000);
		_exit(!child_is_right(m, s));
	}
	if (child < 0 || waitpid(child, &status, 0) != child || log_result(&m->log, status))
		model_fail(m, "a child found wrong memory in slot %u: status %#x", s->id, status);
	for (__u64 page = 0; page < s->pages && !m->failed; page++)
		if (s->copied[page] && !copy_is_right(s, page))
			model_fail(m, "a child changed slot %u page %llu", s->id, page);
}

/* Advice takes page table entries away, and no bytes, but for private copies. */
void op_advise(struct model *m)
{
	static const int advices[] = { MADV_PAGEOUT, MADV_COLD, MADV_DONTNEED };
	int advice = advices[pick(&m->r, ARRAY_SIZE(advices))], err;
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	__u64 first, count;
	bool own;

	if (!s)
		return;
	own = s->own && chance(&m->r, 50);
	first = pick(&m->r, s->pages);
	count = 1 + pick(&m->r, s->pages - first);
	log_op(&m->log, "advise", s->vm, s->id, own, advice, first);
	err = madvise((own ? s->own : s->guest) + first * PAGE, count * PAGE, advice) ? errno : 0;
	log_result(&m->log, err);
	if (err != (s->mem->huge ? EINVAL : 0))
		model_fail(m, "madvise: '%s'", strerror(err));
	if (own && advice == MADV_DONTNEED)
		memset(s->copied + first, false, count * sizeof(s->copied[0]));
}
