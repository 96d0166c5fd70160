// SPDX-License-Identifier: GPL-2.0
/* The model's bookkeeping, and touches as it predicts them. */
#include <stdarg.h>

#include "model.h"

void model_fail(struct model *m, const char *fmt, ...)
{
	va_list args;

	if (m->failed)
		return;
	m->failed = true;
	printf("# op %llu: ", m->log.count - 1);
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	printf("\n# the last calls:\n");
	log_print(&m->log);
}

bool model_start(struct model *m, unsigned long long seed)
{
	memset(m, 0, sizeof(*m));
	m->r = rng_new(seed);
	m->exits_vm = -1;
	touch_init();
	for (int i = 0; i < NR_MEMS; i++) {
		struct mem *mem = &m->mem[i];

		mem->huge = i == 2 && hugetlb_reserve(2);
		mem->sealed = i != 3;
		mem->pages = mem->huge ? 1024 : 256;
		mem->fd = memfd_sealed(mem->huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0, mem->pages,
				       mem->sealed ? F_SEAL_SHRINK : 0);
		mem->alias = mmap(NULL, mem->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
				  mem->fd, 0);
		if (mem->fd < 0 || mem->alias == MAP_FAILED) {
			printf("# memfd %d: %s\n", i, strerror(errno));
			return false;
		}
	}
	for (int i = 0; i < NR_VMS; i++) {
		m->vm[i] = open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (m->vm[i] < 0) {
			printf("# %s: %s\n", KDP_DEVICE_PATH, strerror(errno));
			return false;
		}
	}
	disk_start(m);
	return true;
}

struct mslot *model_find(struct model *m, int vm, __u32 id)
{
	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life == LIFE_LISTED && s->vm == vm && s->id == id)
			return s;
	return NULL;
}

bool model_has_waiter(struct model *m, struct mslot *s, __u64 page, bool any_page)
{
	for (int i = 0; i < NR_WAITERS; i++)
		if (m->waiter[i].active && m->waiter[i].s == s &&
		    (any_page || m->waiter[i].page == page))
			return true;
	return false;
}

static int size_variant(struct model *m, unsigned char *buf, __u32 size, struct errs *errs)
{
	__u32 extra;

	switch (pick(&m->r, 20)) {
	case 0:
		may_fail(errs, true, EINVAL);
		return pick(&m->r, size);
	case 1:
		return size + pick(&m->r, PAGE - size);
	case 2:
		extra = 1 + pick(&m->r, PAGE - size);
		buf[size + pick(&m->r, extra)] = 1 + pick(&m->r, 255);
		may_fail(errs, true, E2BIG);
		return size + extra;
	case 3:
		may_fail(errs, true, E2BIG);
		return PAGE + 1 + pick(&m->r, ~0U - PAGE);
	default:
		return size;
	}
}

int model_call(struct model *m, const char *name, int fd, unsigned long cmd, void *arg,
	       __u32 size, struct errs *errs)
{
	static unsigned char buf[2 * PAGE];
	int err;

	memset(buf, 0, sizeof(buf));
	memcpy(buf, arg, size);
	*(__u32 *)buf = size_variant(m, buf, size, errs);
	err = kdp_ioctl(fd, cmd, buf);
	memcpy(arg, buf, size);
	log_result(&m->log, err);
	if (!err != !errs->n) {
		model_fail(m, "%s: '%s' where %s was due", name, err ? strerror(err) : "success",
			   errs->n ? strerror(errs->e[0]) : "success");
		return err;
	}
	for (int i = 0; i < errs->n; i++)
		if (errs->e[i] == err)
			return err;
	if (err)
		model_fail(m, "%s: '%s', for which there was no reason", name, strerror(err));
	return err;
}

static __u64 word_at(const void *p)
{
	return *(const volatile __u64 *)p;
}

bool model_holds(const unsigned char *p, __u64 head, __u64 tail)
{
	return word_at(p) == head && word_at(p + PAGE - 8) == tail;
}

enum outcome model_outcome(const struct mslot *s, __u64 page, bool own)
{
	if (own && s->copied[page])
		return WORKS;
	if (s->life == LIFE_REMOVED)
		return FAILS;
	if (!s->paging || s->state[page] == KDP_STATE_PRESENT)
		return WORKS;
	if (s->state[page] == KDP_STATE_ZERO)
		return FILLS;
	return s->life == LIFE_LISTED ? WAITS : FAILS;
}

/* The bytes of a page that is mapped now are those of the model. */
static void check_bytes(struct model *m, struct mslot *s, __u64 page)
{
	const unsigned char *p = s->guest + page * PAGE;
	__u64 at = s->first + page;
	__u64 head = word_at(p), tail = word_at(p + PAGE - 8);

	if (head != s->mem->head[at] || tail != s->mem->tail[at])
		model_fail(m, "slot %u page %llu holds %#llx...%#llx, not %#llx...%#llx", s->id, page,
			   head, tail, s->mem->head[at], s->mem->tail[at]);
}

static void set_low_byte(struct mslot *s, __u64 page, unsigned char byte)
{
	__u64 *head = &s->mem->head[s->first + page];

	*head = (*head & ~0xffULL) | byte;
}

void model_zero_fill(struct mslot *s, __u64 page)
{
	s->mem->head[s->first + page] = 0;
	s->mem->tail[s->first + page] = 0;
	s->state[page] = KDP_STATE_PRESENT;
}

static int unread(struct model *m, int vm)
{
	int n = 0;

	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life == LIFE_LISTED && s->vm == vm)
			for (__u64 page = 0; page < s->pages; page++)
				n += s->event[page] == EV_UNREAD || s->event[page] == EV_UNKNOWN;
	return n;
}

/* Begin to wait; come back when the thread is known to be queued. */
static void begin_wait(struct model *m, struct mslot *s, __u64 page, enum touch_kind kind)
{
	struct pollfd pfd = { .fd = m->vm[s->vm], .events = POLLIN };
	struct waiter *w = NULL;
	bool queued;

	for (int i = 0; i < NR_WAITERS; i++)
		if (!m->waiter[i].active)
			w = &m->waiter[i];
	/* Who writes waits alone: the order of a writer and a reader is nobody's promise. */
	if (!w || (model_has_waiter(m, s, page, false) && kind == TOUCH_WRITE))
		return;
	for (int i = 0; i < NR_WAITERS; i++)
		if (m->waiter[i].active && m->waiter[i].s == s && m->waiter[i].page == page &&
		    m->waiter[i].t.kind == TOUCH_WRITE)
			return;
	*w = (struct waiter){ .active = true, .s = s, .page = page };
	w->t.val = rng_next(&m->r);
	if (!toucher_start(&w->t, s->guest + page * PAGE, kind)) {
		model_fail(m, "no thread: %s", strerror(errno));
		w->active = false;
		return;
	}
	/* The first event of all can be polled for; else the thread is looked at until it sleeps. */
	if (s->event[page] == EV_NONE && !unread(m, s->vm))
		queued = poll(&pfd, 1, PATIENCE_MS) == 1;
	else
		queued = toucher_asleep(&w->t);
	if (!queued || w->t.done)
		model_fail(m, "slot %u page %llu is absent, and nobody waits", s->id, page);
	if (s->event[page] == EV_NONE)
		s->event[page] = EV_UNREAD;
}

void model_touch(struct model *m, struct mslot *s, __u64 page, enum touch_kind kind)
{
	unsigned char *p = s->guest + page * PAGE, val = rng_next(&m->r);
	enum outcome outcome = model_outcome(s, page, false);
	int sig;

	if (outcome == WAITS) {
		begin_wait(m, s, page, kind);
		return;
	}
	sig = kind == TOUCH_WRITE ? touch_write(p, val) : touch_read(p, &val);
	log_result(&m->log, sig);
	/* When the VM is closed, an access to a zero page may work or fail. */
	if (outcome == FILLS && s->life == LIFE_ORPHAN && sig == SIGBUS)
		return;
	if (sig != (outcome == FAILS ? SIGBUS : 0)) {
		model_fail(m, "touching slot %u page %llu gave signal %d", s->id, page, sig);
		return;
	}
	if (outcome == FAILS)
		return;
	if (outcome == FILLS)
		model_zero_fill(s, page);
	if (kind == TOUCH_WRITE)
		set_low_byte(s, page, val);
	check_bytes(m, s, page);
	if (kind == TOUCH_READ && val != (unsigned char)s->mem->head[s->first + page])
		model_fail(m, "slot %u page %llu read as %#x first", s->id, page, val);
}

/* What a waiter must have come to by now: 0 is "it still waits". */
static int due(struct waiter *w)
{
	struct mslot *s = w->s;

	if (s->life != LIFE_LISTED)
		return SIGBUS;
	if (!s->paging || s->state[w->page] != KDP_STATE_ABSENT)
		return -1;
	return 0;
}

static void settle_one(struct model *m, struct waiter *w, int want)
{
	struct mslot *s = w->s;
	__u64 page = w->page;

	if (!toucher_join(&w->t)) {
		model_fail(m, "who waits for slot %u page %llu was not woken", s->id, page);
		return;
	}
	w->active = false;
	if (!model_has_waiter(m, s, page, false))
		s->event[page] = EV_NONE;
	if (w->t.result != (want == SIGBUS ? SIGBUS : 0)) {
		model_fail(m, "who waited for slot %u page %llu got signal %d", s->id, page,
			   w->t.result);
		return;
	}
	if (want == SIGBUS)
		return;
	if (s->paging && s->state[page] == KDP_STATE_ZERO)
		model_zero_fill(s, page);
	if (w->t.kind == TOUCH_WRITE)
		set_low_byte(s, page, w->t.val);
	else if (w->t.val != (unsigned char)s->mem->head[s->first + page])
		model_fail(m, "who waited for slot %u page %llu read %#x", s->id, page, w->t.val);
	if (!m->failed)
		check_bytes(m, s, page);
}

void model_settle(struct model *m)
{
	for (struct waiter *w = m->waiter; w < m->waiter + NR_WAITERS && !m->failed; w++) {
		int want = w->active ? due(w) : 0;

		if (want)
			settle_one(m, w, want);
		else if (w->active && w->t.done)
			model_fail(m, "who waits for slot %u page %llu went on, and it is absent",
				   w->s->id, w->page);
	}
}

void model_forget(struct model *m, struct mslot *s)
{
	(void)m;
	if (s->guest)
		munmap(s->guest, s->pages * PAGE);
	if (s->bitmap)
		munmap(s->bitmap, bitmap_bytes(s->pages));
	if (s->own)
		munmap(s->own, s->pages * PAGE);
	close(s->fd);
	memset(s, 0, sizeof(*s));
}

void model_stop(struct model *m)
{
	for (int i = 0; i < NR_VMS; i++)
		close(m->vm[i]);
	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life == LIFE_LISTED)
			s->life = LIFE_ORPHAN;
	model_settle(m);
	if (m->failed)
		return;
	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life)
			model_forget(m, s);
	for (int i = 0; i < NR_MEMS; i++) {
		munmap(m->mem[i].alias, m->mem[i].pages * PAGE);
		close(m->mem[i].fd);
	}
	disk_stop(m);
}

struct mslot *any_slot(struct model *m, enum life at_most)
{
	struct mslot *s = &m->slot[pick(&m->r, NR_SLOTS)];

	return s->life != LIFE_NONE && s->life <= at_most ? s : NULL;
}

__u32 some_id(struct model *m)
{
	return chance(&m->r, 3) ? (__u32)nasty(&m->r) : pick(&m->r, 6);
}

__u32 some_flags(struct model *m, __u32 known, struct errs *errs)
{
	__u32 flags = rng_next(&m->r) & known;

	if (chance(&m->r, 3)) {
		flags |= 1U << pick(&m->r, 32);
		may_fail(errs, flags & ~known, EOPNOTSUPP);
	}
	return flags;
}
