// SPDX-License-Identifier: GPL-2.0
/* Checked memslots: one owner changes states, and everybody else looks. */
#include "concurrent.h"

/* What a page that was made absent holds until it is placed again: nobody may ever see it. */
#define POISON	0xdeaddeaddeaddeadULL

static const int words[] = { 0, 1, 511 };

/* The upper half of each word of a page; who writes changes the lower half. */
static __u32 tag(const struct checked *c, __u64 page)
{
	return 0x5a000000 | c->id << 16 | page;
}

static volatile __u64 *word(unsigned char *memory, __u64 page, int i)
{
	return (volatile __u64 *)(memory + page * PAGE) + words[i];
}

static void fill(struct checked *c, __u64 page, __u64 value)
{
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		*word(c->alias, page, i) = value;
}

enum page_state { ABSENT, PRESENT, MAYBE_ZERO };

struct owned {
	unsigned char state[1024];
	__u64 hidden[1024];	/* what lies in the memfd while the page is absent */
	__u64 made_present, made_absent;
};

static void expect_marked(struct owner *o, struct marked m, __u64 want, const char *what)
{
	log_result(&o->log, m.err ?: (long)m.changed);
	if (m.err || m.done != 1 || m.changed != want)
		concurrent_fail(o->sh, &o->log, "slot %u: %s: %s, done %u, changed %llu, not %llu",
				o->c->id, what, strerror(m.err), m.done, m.changed, want);
}

static struct marked mark(struct owner *o, __u32 state, __u64 page, __u64 count)
{
	log_op(&o->log, "mark", o->c->id, state, page, count, 0);
	return kdp_mark(o->sh->vm[o->c->vm], o->c->id, state, page, count);
}

/* From now on nobody has the page: what is written here, nobody sees. */
static void hide(struct owner *o, struct owned *own, __u64 page)
{
	own->state[page] = ABSENT;
	own->hidden[page] = POISON;
	fill(o->c, page, POISON);
	/* Now and then the memory itself is given back. */
	if (o->c->pages == 64 && chance(&o->r, 10) &&
	    !fallocate(o->c->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE))
		own->hidden[page] = 0;
}

/* Nobody may have written to the page while it was absent. */
static void check_hidden(struct owner *o, struct owned *own, __u64 page)
{
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		if (*word(o->c->alias, page, i) != own->hidden[page])
			concurrent_fail(o->sh, &o->log, "slot %u page %llu was written while absent",
					o->c->id, page);
}

static void place(struct owner *o, struct owned *own, __u64 page)
{
	bool by_hand = chance(&o->r, 30);

	check_hidden(o, own, page);
	if (o->c->zeros && chance(&o->r, 50)) {
		expect_marked(o, mark(o, KDP_STATE_ZERO, page, 1), 1, "zero");
		own->state[page] = MAYBE_ZERO;
		return;
	}
	fill(o->c, page, (__u64)tag(o->c, page) << 32);
	if (by_hand)
		bit_set(o->c->bitmap, page);
	expect_marked(o, mark(o, KDP_STATE_PRESENT, page, 1), !by_hand, "present");
	own->state[page] = PRESENT;
	own->made_present++;
}

static void take(struct owner *o, struct owned *own, __u64 page)
{
	expect_marked(o, mark(o, KDP_STATE_ABSENT, page, 1), 1, "absent");
	own->made_absent += own->state[page] == PRESENT;
	hide(o, own, page);
}

static void place_all(struct owner *o, struct owned *own)
{
	__u64 absent = 0;

	/* The bytes of a zero page may not be in the memfd yet. */
	if (memchr(own->state, MAYBE_ZERO, o->c->pages))
		return;
	for (__u64 page = 0; page < o->c->pages; page++)
		if (own->state[page] == ABSENT) {
			check_hidden(o, own, page);
			fill(o->c, page, (__u64)tag(o->c, page) << 32);
			absent++;
		}
	expect_marked(o, mark(o, KDP_STATE_PRESENT, 0, o->c->pages), absent, "all present");
	own->made_present += absent;
	memset(own->state, PRESENT, sizeof(own->state));
}

static void repage(struct owner *o, struct owned *own)
{
	int vm = o->sh->vm[o->c->vm], err;

	/* With all bytes in place, paging can go off and come back. */
	place_all(o, own);
	if (memchr(own->state, MAYBE_ZERO, o->c->pages))
		return;
	log_op(&o->log, "paging off, on present", o->c->id, 0, 0, 0, 0);
	err = kdp_paging(vm, o->c->id, KDP_PAGING_OFF);
	if (!err)
		err = kdp_paging(vm, o->c->id, KDP_PAGING_ON_PRESENT);
	log_result(&o->log, err);
	if (err)
		concurrent_fail(o->sh, &o->log, "paging off and on: %s", strerror(err));
}

/* Everything becomes present and stays so; then the sums and the bits must be right. */
static void finish(struct owner *o, struct owned *own)
{
	struct checked *c = o->c;
	__u64 present = 0;

	for (__u64 page = 0; page < c->pages; page++)
		if (own->state[page] == MAYBE_ZERO)
			take(o, own, page);
	for (__u64 page = 0; page < c->pages; page++)
		present += own->state[page] == PRESENT;
	if (own->made_present - own->made_absent != present)
		concurrent_fail(o->sh, &o->log, "slot %u: %llu made present, %llu absent, %llu left",
				c->id, own->made_present, own->made_absent, present);
	for (__u64 page = 0; page < c->pages; page++)
		if (bit_get(c->bitmap, page) != (own->state[page] == PRESENT))
			concurrent_fail(o->sh, &o->log, "slot %u page %llu: wrong bit at the end",
					c->id, page);
	place_all(o, own);
}

void *owner_main(void *arg)
{
	static _Thread_local struct owned own;
	struct owner *o = arg;

	for (__u64 page = 0; page < o->c->pages; page++)
		hide(o, &own, page);
	while (!o->sh->stop) {
		__u64 page = pick(&o->r, o->c->pages);

		if (chance(&o->r, 1)) {
			if (chance(&o->r, 30))
				repage(o, &own);
			else
				place_all(o, &own);
		} else if (own.state[page] == ABSENT) {
			place(o, &own, page);
		} else if (chance(&o->r, 50)) {
			take(o, &own, page);
		} else {
			/* It is there already: a second place changes nothing. */
			expect_marked(o, mark(o, KDP_STATE_ZERO, page, 1), 0, "zero again");
		}
		o->sh->ops++;
	}
	finish(o, &own);
	return NULL;
}

void checked_touch(struct task *t)
{
	struct checked *c = &t->sh->checked[pick(&t->r, NR_CHECKED)];
	__u64 page = pick(&t->r, c->pages), value;
	int i = pick(&t->r, ARRAY_SIZE(words)), sig;
	bool writes = chance(&t->r, 40), own = c->own && chance(&t->r, 10);
	volatile __u64 *p = word(own ? c->own : c->guest, page, i);

	log_op(&t->log, writes ? "write" : "read", c->id, page, i, own, 0);
	/* What is dropped is copied anew. */
	if (own && chance(&t->r, 20))
		madvise(c->own + page * PAGE, PAGE, MADV_DONTNEED);
	t->sh->touching[t->index] = 1;
	sig = sigsetjmp(touch_env, 1);
	if (!sig) {
		touch_armed = 1;
		if (writes)
			*p = value = (__u64)tag(c, page) << 32 | (rng_next(&t->r) & 0xffffffff);
		else
			value = *p;
		touch_armed = 0;
	}
	t->sh->touching[t->index] = 0;
	log_result(&t->log, sig);
	if (sig)
		concurrent_fail(t->sh, &t->log, "slot %u page %llu: signal %d", c->id, page, sig);
	else if (value >> 32 != tag(c, page) && !(c->zeros && !value))
		concurrent_fail(t->sh, &t->log, "slot %u page %llu holds %#llx", c->id, page, value);
}
