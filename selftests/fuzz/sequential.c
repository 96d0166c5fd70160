// SPDX-License-Identifier: GPL-2.0
/* One thread against the model: what each call does is known before it is made. */
#include <sys/mman.h>

#include "model.h"

/* Of the ioctls that there are, from 0x80 on. */
#define LAST_NR	_IOC_NR(KDP_MEMFD)

static __u64 mark_one(struct mslot *s, __u64 page, __u32 state)
{
	bool was_present = s->state[page] == KDP_STATE_PRESENT;

	if (state == KDP_STATE_ABSENT && s->event[page])
		s->event[page] = EV_UNKNOWN;
	if (s->state[page] == state || (was_present && state == KDP_STATE_ZERO))
		return 0;
	s->state[page] = state;
	return 1;
}

static void op_mark(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_mark a = KDP_ARG(kdp_mark, .slot_id = some_id(m), .state = pick(&m->r, 3),
				    .nr_ranges = 1 + pick(&m->r, 4), .done = rng_next(&m->r),
				    .changed = rng_next(&m->r));
	struct mslot *s = model_find(m, vm, a.slot_id);
	__u64 pages = s ? s->pages : 16, changed = 0;
	struct kdp_range ranges[8];
	struct errs errs = { 0 };

	a.flags = some_flags(m, 0, &errs);
	a.ranges = (uintptr_t)ranges;
	for (__u32 i = 0; i < a.nr_ranges; i++) {
		ranges[i].first = pick(&m->r, pages);
		ranges[i].count = 1 + pick(&m->r, chance(&m->r, 70) ? 8 : pages);
		if (ranges[i].count > pages - ranges[i].first)
			ranges[i].count = pages - ranges[i].first;
		if (chance(&m->r, 2))
			ranges[i].count = nasty(&m->r);
		if (chance(&m->r, 2))
			ranges[i].first = nasty(&m->r);
		may_fail(&errs, s && (!ranges[i].count || ranges[i].first >= pages ||
			 ranges[i].count > pages - ranges[i].first), EINVAL);
	}
	switch (pick(&m->r, 60)) {
	case 0:
		a.state = nasty(&m->r);
		break;
	case 1:
		a.nr_ranges = 0;
		break;
	case 2:
		a.nr_ranges = KDP_MAX_RANGES + 1 + pick(&m->r, 1000);
		break;
	case 3:
		a.ranges = chance(&m->r, 50) ? 0 : 0xffff888000000000ULL;
		break;
	}
	may_fail(&errs, a.state > KDP_STATE_ZERO, EOPNOTSUPP);
	may_fail(&errs, !a.nr_ranges || a.nr_ranges > KDP_MAX_RANGES, EINVAL);
	may_fail(&errs, a.ranges != (uintptr_t)ranges, EFAULT);
	may_fail(&errs, !s, ENOENT);
	may_fail(&errs, s && !s->paging && a.state != KDP_STATE_PRESENT, ENXIO);
	log_op(&m->log, "mark", vm, a.slot_id, a.state, ranges[0].first, ranges[0].count);
	if (model_call(m, "KDP_MARK", m->vm[vm], KDP_MARK, &a, sizeof(a), &errs) || m->failed)
		return;
	for (__u32 i = 0; i < a.nr_ranges && s->paging; i++)
		for (__u64 page = 0; page < ranges[i].count; page++)
			changed += mark_one(s, ranges[i].first + page, a.state);
	if (a.done != a.nr_ranges || a.changed != changed)
		model_fail(m, "KDP_MARK of %u ranges says done %u, changed %llu, not %llu",
			   a.nr_ranges, a.done, a.changed, changed);
}

/* What the call must say of a range; the model's memslots on huge pages are whole blocks long. */
static void expect_collapse(struct mslot *s, struct kdp_collapse *a)
{
	__u64 end = a->first + a->count, next;

	a->collapsed = 0;
	a->incomplete = 0;
	a->small = 0;
	a->missing = ~0ULL;
	for (__u64 page = a->first; page < end; page = next) {
		__u64 missing = ~0ULL;

		next = (page / 512 + 1) * 512;
		if (next > end)
			next = end;
		if (!s->mem->huge || next - page < 512) {
			a->small += next - page;
			continue;
		}
		for (__u64 i = page; i < next && s->paging && missing == ~0ULL; i++)
			if (s->state[i] != KDP_STATE_PRESENT)
				missing = i;
		if (missing == ~0ULL) {
			a->collapsed += next - page;
			continue;
		}
		a->incomplete += next - page;
		if (a->missing == ~0ULL)
			a->missing = missing;
	}
}

static void op_collapse(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_collapse a = KDP_ARG(kdp_collapse, .slot_id = some_id(m)), want;
	struct mslot *s = model_find(m, vm, a.slot_id);
	__u64 pages = s ? s->pages : 16;
	struct errs errs = { 0 };

	a.flags = some_flags(m, 0, &errs);
	a.first = chance(&m->r, 50) ? 0 : pick(&m->r, pages);
	a.count = chance(&m->r, 50) ? pages - a.first : 1 + pick(&m->r, pages - a.first);
	if (chance(&m->r, 5))
		a.count = nasty(&m->r);
	if (chance(&m->r, 5))
		a.first = nasty(&m->r);
	may_fail(&errs, !s, ENOENT);
	may_fail(&errs, s && (!a.count || a.first >= pages || a.count > pages - a.first), EINVAL);
	log_op(&m->log, "collapse", vm, a.slot_id, a.first, a.count, 0);
	want = a;
	if (model_call(m, "KDP_COLLAPSE", m->vm[vm], KDP_COLLAPSE, &a, sizeof(a), &errs) || m->failed)
		return;
	expect_collapse(s, &want);
	if (a.collapsed != want.collapsed || a.incomplete != want.incomplete ||
	    a.small != want.small || a.missing != want.missing)
		model_fail(m, "KDP_COLLAPSE says %llu, %llu, %llu, %#llx, not %llu, %llu, %llu, %#llx",
			   a.collapsed, a.incomplete, a.small, a.missing, want.collapsed,
			   want.incomplete, want.small, want.missing);
}

static void op_touch(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	__u64 page;

	if (!s || !s->guest)
		return;
	page = pick(&m->r, s->pages);
	/* Waiting costs a thread and time: not for every absent page. */
	if (s->life == LIFE_LISTED && s->paging && s->state[page] == KDP_STATE_ABSENT &&
	    !chance(&m->r, 10))
		return;
	log_op(&m->log, "touch", s->vm, s->id, page, s->life, s->state[page]);
	model_touch(m, s, page, chance(&m->r, 50) ? TOUCH_WRITE : TOUCH_READ);
}

static void op_alias(struct model *m)
{
	struct mem *mem = &m->mem[pick(&m->r, NR_MEMS)];
	__u64 page = pick(&m->r, mem->pages);

	mem->head[page] = rng_next(&m->r);
	mem->tail[page] = rng_next(&m->r);
	*(volatile __u64 *)(mem->alias + page * PAGE) = mem->head[page];
	*(volatile __u64 *)(mem->alias + page * PAGE + PAGE - 8) = mem->tail[page];
}

static void op_set_bit(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_LISTED);
	__u64 page;

	if (!s || !s->paging)
		return;
	page = pick(&m->r, s->pages);
	log_op(&m->log, "set bit", s->vm, s->id, page, s->state[page], 0);
	if (touch_or(&s->bitmap[page / 64], 1ULL << (page % 64))) {
		model_fail(m, "the bitmap of slot %u cannot be written", s->id);
		return;
	}
	s->state[page] = KDP_STATE_PRESENT;
	/* A page that somebody waits for must be resolved by KDP_MARK, which wakes. */
	if (model_has_waiter(m, s, page, false) &&
	    kdp_mark(m->vm[s->vm], s->id, KDP_STATE_PRESENT, page, 1).changed)
		model_fail(m, "a page whose bit was set was not present");
}

static void op_check_bitmap(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_REMOVED);
	unsigned char byte;

	if (!s)
		return;
	log_op(&m->log, "check bitmap", s->vm, s->id, s->paging, s->life, 0);
	if (!s->paging || s->life == LIFE_REMOVED) {
		if (touch_read((char *)s->bitmap, &byte) != SIGBUS)
			model_fail(m, "slot %u has a bitmap and should have none", s->id);
		return;
	}
	for (__u64 page = 0; page < s->pages; page++)
		if (bit_get(s->bitmap, page) != (s->state[page] == KDP_STATE_PRESENT)) {
			model_fail(m, "slot %u page %llu: the bit is %d, the state %u", s->id, page,
				   bit_get(s->bitmap, page), s->state[page]);
			return;
		}
}

static void op_map(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_LISTED);
	__u64 offset, length, limit;
	bool bitmap, private, fits, good;
	int err;
	void *p;

	if (!s)
		return;
	bitmap = chance(&m->r, 30);
	limit = bitmap ? bitmap_bytes(s->pages) / PAGE : s->pages;
	offset = chance(&m->r, 10) ? nasty(&m->r) % (1ULL << 50) : pick(&m->r, limit);
	length = chance(&m->r, 10) ? 1 + nasty(&m->r) % (1ULL << 24) : 1 + pick(&m->r, limit);
	private = chance(&m->r, 20);
	fits = offset < limit && length <= limit - offset && (!bitmap || s->paging);
	/* Memory of shmem alone can be private. */
	good = fits && !(private && (bitmap || s->mem->huge));
	log_op(&m->log, private ? "map private" : "map", s->vm, s->id, bitmap, offset, length);
	p = mmap(NULL, length * PAGE, PROT_READ | PROT_WRITE, private ? MAP_PRIVATE : MAP_SHARED,
		 s->fd, (bitmap ? KDP_BITMAP_OFFSET : 0) + offset * PAGE);
	err = p == MAP_FAILED ? errno : 0;
	log_result(&m->log, err);
	if (fits && !good && err != EINVAL)
		model_fail(m, "mmap of what cannot be private: '%s'", strerror(err));
	/* Whether a bitmap that is not there can be mapped is not said. */
	if (good != (p != MAP_FAILED) && (!bitmap || s->paging))
		model_fail(m, "mmap %s", good ? "failed" : "worked, and should not");
	if (p != MAP_FAILED)
		munmap(p, length * PAGE);
}

static void op_remap(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	size_t bytes;
	void *to;

	/* A waiting thread knows the old address. */
	if (!s || model_has_waiter(m, s, 0, true))
		return;
	bytes = s->pages * PAGE;
	log_op(&m->log, "remap", s->vm, s->id, s->life, 0, 0);
	to = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (to == MAP_FAILED ||
	    mremap(s->guest, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) {
		model_fail(m, "mremap: %s", strerror(errno));
		return;
	}
	s->guest = to;
	if (mremap(to, bytes, bytes + PAGE, MREMAP_MAYMOVE) != MAP_FAILED)
		model_fail(m, "a mapping has grown");
}

static void op_read(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_event ev[4];
	__u64 room = 1 + pick(&m->r, 4);
	int sure = 0, maybe = 0;
	ssize_t got;

	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life == LIFE_LISTED && s->vm == vm)
			for (__u64 page = 0; page < s->pages; page++) {
				sure += s->event[page] == EV_UNREAD;
				maybe += s->event[page] == EV_UNKNOWN;
			}
	log_op(&m->log, "read", vm, room, sure, maybe, 0);
	if (chance(&m->r, 10)) {
		got = read(m->vm[vm], ev, pick(&m->r, sizeof(ev[0])));
		if (got >= 0 || errno != EINVAL)
			model_fail(m, "a read into a short buffer gave %zd", got);
		if (sure && (read(m->vm[vm], (void *)8, sizeof(ev[0])) >= 0 || errno != EFAULT))
			model_fail(m, "a read into no buffer: %s", strerror(errno));
	}
	got = read(m->vm[vm], ev, room * sizeof(ev[0]) + pick(&m->r, sizeof(ev[0])));
	log_result(&m->log, got < 0 ? -errno : got);
	if (got < 0) {
		if (errno != EAGAIN || sure)
			model_fail(m, "read: %s, with %d events due", strerror(errno), sure);
		return;
	}
	got /= sizeof(ev[0]);
	if (got < 1 || (unsigned int)got > room || (got < sure && (unsigned int)got < room))
		model_fail(m, "read gave %zd events of %d", got, sure);
	for (int i = 0; i < got && !m->failed; i++) {
		struct mslot *s = model_find(m, vm, ev[i].slot_id);
		__u32 waiters = 0;

		if (!s || ev[i].page >= s->pages || (s->event[ev[i].page] != EV_UNREAD &&
						     s->event[ev[i].page] != EV_UNKNOWN)) {
			model_fail(m, "an event for slot %u page %llu was not due", ev[i].slot_id,
				   ev[i].page);
			return;
		}
		for (int w = 0; w < NR_WAITERS; w++)
			waiters += m->waiter[w].active && m->waiter[w].s == s &&
				   m->waiter[w].page == ev[i].page;
		if (ev[i].type != KDP_EVENT_ABSENT || ev[i].gfn != s->base + ev[i].page ||
		    !(ev[i].access & KDP_ACCESS_USER) || !ev[i].tid || ev[i].__reserved ||
		    (s->event[ev[i].page] == EV_UNREAD &&
		     (ev[i].deliveries != 1 || ev[i].waiters != waiters)))
			model_fail(m, "event: gfn %#llx access %#x waiters %u (not %u) deliveries %u",
				   ev[i].gfn, ev[i].access, ev[i].waiters, waiters, ev[i].deliveries);
		/* What was unknown stays so: a late one may queue itself once more. */
		if (s->event[ev[i].page] == EV_UNREAD)
			s->event[ev[i].page] = EV_READ;
	}
}

static void op_exits(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_vcpu_exits a = KDP_ARG(kdp_vcpu_exits, .mode = pick(&m->r, 2));
	struct errs errs = { 0 };
	struct kdp_info info;

	/* Off for a VM that another has is not said; and it is slow: seldom. */
	if (!chance(&m->r, 10) || (a.mode == KDP_EXITS_OFF && m->exits_vm >= 0 && m->exits_vm != vm))
		return;
	if (kdp_info(m->vm[vm], &info) || !(info.features & KDP_FEATURE_EXITS))
		return;
	a.flags = some_flags(m, 0, &errs);
	may_fail(&errs, a.mode == KDP_EXITS_ON && m->exits_vm >= 0 && m->exits_vm != vm, EBUSY);
	log_op(&m->log, "exits", vm, a.mode, a.flags, 0, 0);
	if (!model_call(m, "KDP_VCPU_EXITS", m->vm[vm], KDP_VCPU_EXITS, &a, sizeof(a), &errs))
		m->exits_vm = a.mode == KDP_EXITS_ON ? vm : -1;
}

static void op_junk(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	int vm = pick(&m->r, NR_VMS);
	unsigned int known = 0x80 + pick(&m->r, LAST_NR - 0x7f);
	__u64 junk[32];
	unsigned int cmd;

	for (size_t i = 0; i < ARRAY_SIZE(junk); i++)
		junk[i] = nasty(&m->r);
	cmd = chance(&m->r, 50) ? _IO(KDP_IOC_TYPE, LAST_NR + 1 + pick(&m->r, 0xff - LAST_NR)) :
		_IOWR(KDP_IOC_TYPE, known, struct kdp_mark);
	log_op(&m->log, "junk", vm, cmd, 0, 0, 0);
	if (kdp_ioctl(m->vm[vm], cmd, junk) != ENOTTY)
		model_fail(m, "an unknown ioctl %#x: %s", cmd, strerror(errno));
	if (s && kdp_ioctl(s->fd, _IO(KDP_IOC_TYPE, known), junk) != ENOTTY)
		model_fail(m, "an ioctl on a memslot: %s", strerror(errno));
}

/* Give memory back. Nobody pins pages of shmem: whatever their state is, they hold zeros then. */
static void op_punch(struct model *m)
{
	struct mem *mem = &m->mem[pick(&m->r, 2)];
	__u64 at = pick(&m->r, mem->pages);

	log_op(&m->log, "punch", mem - m->mem, at, 0, 0, 0);
	if (fallocate(mem->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at * PAGE, PAGE))
		model_fail(m, "fallocate: %s", strerror(errno));
	mem->head[at] = mem->tail[at] = 0;
}

static const struct {
	void (*op)(struct model *m);
	unsigned int weight;
} ops[] = {
	{ op_touch, 30 }, { op_mark, 22 }, { op_alias, 8 }, { op_set_bit, 6 }, { op_read, 6 },
	{ op_check_bitmap, 4 }, { op_create, 6 }, { op_remove, 2 }, { op_get, 3 }, { op_paging, 2 },
	{ op_map, 3 }, { op_remap, 1 }, { op_junk, 2 }, { op_punch, 2 }, { op_exits, 1 },
	{ op_close_vm, 1 }, { op_forget, 1 }, { op_collapse, 2 },
	{ op_private, 12 }, { op_fork, 1 }, { op_advise, 2 }, { op_direct, 4 },
};

/* A call that does not come back shows as no progress. */
static void *watchdog(void *arg)
{
	struct model *m = arg;
	unsigned long long last = ~0ULL;

	for (;;) {
		if (m->log.count == last) {
			model_fail(m, "no progress for %d s: the call hangs", 3 * PATIENCE_MS / 1000);
			_exit(1);
		}
		last = m->log.count;
		usleep(3 * PATIENCE_MS * 1000);
	}
	return NULL;
}

static struct model m;

static void unexpected(int sig)
{
	model_fail(&m, "signal %d outside of a touch", sig);
}

bool fuzz_sequential(const struct options *opt)
{
	long long end = opt->seconds ? now_ms() + opt->seconds * 1000LL : 0;
	unsigned long long n;
	unsigned int total = 0;
	pthread_t thread;

	touch_unexpected = unexpected;
	if (!model_start(&m, opt->seed) || pthread_create(&thread, NULL, watchdog, &m))
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(ops); i++)
		total += ops[i].weight;
	for (n = 0; n < opt->ops && !m.failed; n++) {
		unsigned int at = pick(&m.r, total), i = 0;

		while (at >= ops[i].weight)
			at -= ops[i++].weight;
		ops[i].op(&m);
		if (!m.failed)
			model_settle(&m);
		if (end && !(n % 256) && now_ms() > end)
			break;
	}
	printf("# %llu ops are done\n", n);
	log_op(&m.log, "stop", 0, 0, 0, 0, 0);
	if (!m.failed)
		model_stop(&m);
	return !m.failed;
}
