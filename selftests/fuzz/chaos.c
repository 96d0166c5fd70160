// SPDX-License-Identifier: GPL-2.0
/* Memslots with which everybody does everything; errnos and signals are what is checked. */
#include "concurrent.h"

/* VMs of one process that its threads open, use and close under each other's feet. */
static atomic_int table[8];
static atomic_bool table_ready;

static bool one_of(int err, const int *list)
{
	for (; *list; list++)
		if (err == *list)
			return true;
	return false;
}

static const int common[] = { EINVAL, E2BIG, EOPNOTSUPP, EFAULT, ENOMEM, 0 };
/* What a descriptor that is closed, or is another file by now, gives. */
static const int stale[] = { EBADF, ENOTTY, 0 };

/* The errors of each call, beside the common ones. */
static const int *own_errs(unsigned long cmd)
{
	static const int create[] = { EBADF, EACCES, EPERM, EEXIST, ENOSPC, EMFILE, ENFILE, 0 };
	static const int slot[] = { ENOENT, 0 };
	static const int get[] = { ENOENT, EMFILE, ENFILE, 0 };
	static const int mark[] = { ENOENT, ENXIO, EINTR, 0 };
	static const int exits[] = { EBUSY, ENOSPC, 0 };
	static const int paging[] = { ENOENT, EINTR, 0 };
	static const int source[] = { ENOENT, ENXIO, EINTR, EBADF, EACCES, 0 };
	static const int replace[] = { ENOENT, ENXIO, EINTR, EBADF, EACCES, EPERM, EBUSY, 0 };
	static const int claimant[] = { ENOENT, ENOSPC, EMFILE, ENFILE, 0 };
	static const int memfd[] = { EMFILE, ENFILE, 0 };
	static const int none[] = { 0 };

	switch (cmd) {
	case KDP_MEMSLOT_CREATE:
		return create;
	case KDP_MEMSLOT_GET:
		return get;
	case KDP_MARK:
	case KDP_PLACE:
	case KDP_CLAIM:
	case KDP_COMMIT:
		return mark;
	case KDP_CLAIMANT:
		return claimant;
	case KDP_MEMFD:
		return memfd;
	case KDP_PAGING:
	case KDP_COLLAPSE:
	case KDP_POISON:
		return paging;
	case KDP_SOURCE:
		return source;
	case KDP_REPLACE:
		return replace;
	case KDP_VCPU_EXITS:
		return exits;
	case KDP_INFO:
		return none;
	default:
		return slot;
	}
}

/* Make a call; `unsure` says that the fd may be anything by now. */
static int call(struct task *t, int fd, bool unsure, unsigned long cmd, void *arg)
{
	int err;

	log_op(&t->log, "ioctl", fd, cmd, ((__u32 *)arg)[0], ((__u32 *)arg)[1], ((__u32 *)arg)[2]);
	err = log_result(&t->log, kdp_ioctl(fd, cmd, arg));
	if (err && !one_of(err, common) && !one_of(err, own_errs(cmd)) &&
	    !(unsure && one_of(err, stale)))
		concurrent_fail(t->sh, &t->log, "ioctl %#lx: '%s' is not among its errors", cmd,
				strerror(err));
	return err;
}

static __u32 chaos_id(struct task *t)
{
	return CHAOS_ID + pick(&t->r, CHAOS_IDS);
}

/* Spoil an argument, seldom; checked memslots are never named. */
static void spoil(struct task *t, void *arg, size_t size, size_t keep_at)
{
	__u32 *field = arg;
	size_t at = pick(&t->r, size / 4);

	if (chance(&t->r, 5) && at != keep_at / 4)
		field[at] = nasty(&t->r);
}

/* Touch some pages of a memslot whose absent pages somebody serves. */
static void touch_some(struct task *t, int fd)
{
	size_t pages = 1 + pick(&t->r, 64);
	int flags = chance(&t->r, 20) ? MAP_PRIVATE : MAP_SHARED;
	unsigned char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd,
				pick(&t->r, 4) * PAGE), val = 1;

	if (p == MAP_FAILED)
		return;
	for (int i = 0; i < 4; i++) {
		void *at = p + pick(&t->r, pages) * PAGE;
		int sig = chance(&t->r, 50) ? touch_read(at, &val) : touch_write(at, val);

		if (sig && sig != SIGBUS)
			concurrent_fail(t->sh, &t->log, "signal %d", sig);
	}
	munmap(p, pages * PAGE);
}

static void chaos_create(struct task *t, int vm, bool unsure, bool touch)
{
	struct kdp_memslot_create a = KDP_ARG(kdp_memslot_create,
		.flags = pick(&t->r, 2), .slot_id = chaos_id(t), .memfd = t->sh->chaos_memfd[pick(&t->r, 3)],
		.base_gfn = (1 << 20) + pick(&t->r, 1024), .nr_pages = 1 + pick(&t->r, 128));

	if (chance(&t->r, 20))
		snprintf((char *)a.name, sizeof(a.name), "chaos-%llu", pick(&t->r, 4));
	spoil(t, &a, sizeof(a), offsetof(struct kdp_memslot_create, slot_id));
	if (call(t, vm, unsure, KDP_MEMSLOT_CREATE, &a))
		return;
	if (touch)
		touch_some(t, a.fd);
	close(a.fd);
}

static void chaos_get(struct task *t, int vm, bool unsure, bool touch)
{
	struct kdp_memslot_get a = KDP_ARG(kdp_memslot_get, .slot_id = chaos_id(t),
					   .flags = pick(&t->r, 8));

	spoil(t, &a, sizeof(a), offsetof(struct kdp_memslot_get, slot_id));
	if (call(t, vm, unsure, KDP_MEMSLOT_GET, &a))
		return;
	if (a.fd >= 0) {
		/* GET_NEXT may have found a checked one, when a flag made the id small. */
		if (touch && a.slot_id >= CHAOS_ID)
			touch_some(t, a.fd);
		close(a.fd);
	}
	if (a.memfd >= 0)
		close(a.memfd);
}

static void chaos_bits(struct task *t, int vm)
{
	struct kdp_memslot_get a = KDP_ARG(kdp_memslot_get, .slot_id = chaos_id(t), .flags = KDP_GET_FD);
	atomic_ullong *bitmap;

	if (call(t, vm, false, KDP_MEMSLOT_GET, &a))
		return;
	bitmap = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a.fd, KDP_BITMAP_OFFSET);
	if (bitmap != MAP_FAILED) {
		touch_or(&bitmap[pick(&t->r, 512)], rng_next(&t->r));
		munmap(bitmap, PAGE);
	}
	close(a.fd);
}

static void chaos_mark(struct task *t, int vm, bool unsure)
{
	struct kdp_range ranges[4];
	struct kdp_mark a = KDP_ARG(kdp_mark, .slot_id = chaos_id(t), .state = pick(&t->r, 3),
				    .ranges = (uintptr_t)ranges, .nr_ranges = 1 + pick(&t->r, 4));

	for (int i = 0; i < 4; i++)
		ranges[i] = (struct kdp_range){ pick(&t->r, 128), 1 + pick(&t->r, 16) };
	if (chance(&t->r, 3))
		ranges[pick(&t->r, 4)] = (struct kdp_range){ nasty(&t->r), nasty(&t->r) };
	spoil(t, &a, sizeof(a), offsetof(struct kdp_mark, slot_id));
	call(t, vm, unsure, KDP_MARK, &a);
}

/* The memfd is a source like any other file. */
static void chaos_source(struct task *t, int vm, bool unsure)
{
	struct kdp_range ranges[4];
	struct kdp_source a = KDP_ARG(kdp_source, .slot_id = chaos_id(t),
				      .fd = t->sh->chaos_memfd[pick(&t->r, 3)],
				      .offset = pick(&t->r, 64) * PAGE, .ranges = (uintptr_t)ranges,
				      .nr_ranges = pick(&t->r, 5));

	for (int i = 0; i < 4; i++)
		ranges[i] = (struct kdp_range){ pick(&t->r, 128), 1 + pick(&t->r, 16) };
	if (chance(&t->r, 40)) {
		a.flags = KDP_SOURCE_ADD;
		a.fd = -1;
		a.offset = 0;
	} else if (chance(&t->r, 10)) {
		a.fd = -1;
	}
	spoil(t, &a, sizeof(a), offsetof(struct kdp_source, slot_id));
	call(t, vm, unsure, KDP_SOURCE, &a);
}

static void chaos_poison(struct task *t, int vm, bool unsure)
{
	struct kdp_poisoned found[4];
	struct kdp_range ranges[4];
	struct kdp_poison a = KDP_ARG(kdp_poison, .slot_id = chaos_id(t),
				      .ranges = (uintptr_t)ranges, .nr_ranges = 1 + pick(&t->r, 4));
	struct kdp_poison_list list = KDP_ARG(kdp_poison_list, .slot_id = chaos_id(t), .count = 4,
					      .first = pick(&t->r, 128), .poisoned = (uintptr_t)found);

	for (int i = 0; i < 4; i++)
		ranges[i] = (struct kdp_range){ pick(&t->r, 128), 1 + pick(&t->r, 8) };
	if (chance(&t->r, 20)) {
		spoil(t, &list, sizeof(list), offsetof(struct kdp_poison_list, slot_id));
		call(t, vm, unsure, KDP_POISON_LIST, &list);
		return;
	}
	/* More is healed than poisoned. */
	if (chance(&t->r, 60)) {
		a.flags = KDP_POISON_HEAL;
		ranges[0] = (struct kdp_range){ 0, 1 + pick(&t->r, 64) };
	} else {
		a.cause = KDP_CAUSE_EMULATED + pick(&t->r, 2);
	}
	spoil(t, &a, sizeof(a), offsetof(struct kdp_poison, slot_id));
	call(t, vm, unsure, KDP_POISON, &a);
}

/* Fill pages by calls: as somebody who has their bytes, and as one who is the only one to write them. */
static void chaos_fill(struct task *t, int vm, bool unsure)
{
	static const unsigned char data[8 * PAGE];
	unsigned char results[128];
	struct kdp_place place = KDP_ARG(kdp_place, .slot_id = chaos_id(t), .first = pick(&t->r, 128),
					 .count = 1 + pick(&t->r, 8), .data = (uintptr_t)data,
					 .results = chance(&t->r, 50) ? (uintptr_t)results : 0);
	struct kdp_claimant own = KDP_ARG(kdp_claimant, .slot_id = chaos_id(t));

	if (chance(&t->r, 50)) {
		spoil(t, &place, sizeof(place), offsetof(struct kdp_place, slot_id));
		/* Nobody reads from, or writes to, what is not ours. */
		place.data = (uintptr_t)data;
		if (place.count > 8)
			place.data = 0;
		if (place.results)
			place.results = (uintptr_t)results;
		call(t, vm, unsure, KDP_PLACE, &place);
		return;
	}
	spoil(t, &own, sizeof(own), offsetof(struct kdp_claimant, slot_id));
	if (call(t, vm, unsure, KDP_CLAIMANT, &own))
		return;
	/* What is left of its claims in the end goes with it. */
	for (int i = 0; i < 6; i++) {
		struct kdp_claim claim = KDP_ARG(kdp_claim, .first = pick(&t->r, 128),
						 .count = 1 + pick(&t->r, 100));
		bool commits = chance(&t->r, 50);

		claim.flags = commits && chance(&t->r, 30) ? KDP_COMMIT_ABANDON : 0;
		spoil(t, &claim, sizeof(claim), 0);
		claim.results = claim.count <= sizeof(results) && chance(&t->r, 50) ?
			(uintptr_t)results : 0;
		call(t, own.fd, false, commits ? KDP_COMMIT : KDP_CLAIM, &claim);
	}
	close(own.fd);
}

static void chaos_simple(struct task *t, int vm, bool unsure)
{
	struct kdp_paging paging = KDP_ARG(kdp_paging, .slot_id = chaos_id(t), .mode = pick(&t->r, 3));
	struct kdp_memslot_remove remove = KDP_ARG(kdp_memslot_remove, .slot_id = chaos_id(t));
	struct kdp_vcpu_exits exits = KDP_ARG(kdp_vcpu_exits, .mode = pick(&t->r, 2));
	struct kdp_collapse collapse = KDP_ARG(kdp_collapse, .slot_id = chaos_id(t),
					       .count = 1 + pick(&t->r, 128));
	struct kdp_replace replace = KDP_ARG(kdp_replace, .slot_id = chaos_id(t), .memfd = -1,
					     .first = pick(&t->r, 2) * 512);
	struct kdp_info info = KDP_ARG(kdp_info);

	switch (pick(&t->r, 10)) {
	case 0:
	case 1:
	case 2:
		spoil(t, &paging, sizeof(paging), offsetof(struct kdp_paging, slot_id));
		call(t, vm, unsure, KDP_PAGING, &paging);
		break;
	case 3:
	case 4:
		spoil(t, &remove, sizeof(remove), offsetof(struct kdp_memslot_remove, slot_id));
		call(t, vm, unsure, KDP_MEMSLOT_REMOVE, &remove);
		break;
	case 5:
		if (chance(&t->r, 10)) {
			spoil(t, &exits, sizeof(exits), 0);
			call(t, vm, unsure, KDP_VCPU_EXITS, &exits);
		}
		break;
	case 6:
		spoil(t, &collapse, sizeof(collapse), offsetof(struct kdp_collapse, slot_id));
		call(t, vm, unsure, KDP_COLLAPSE, &collapse);
		break;
	case 7:
		spoil(t, &replace, sizeof(replace), offsetof(struct kdp_replace, slot_id));
		call(t, vm, unsure, KDP_REPLACE, &replace);
		break;
	default:
		spoil(t, &info, sizeof(info), 0);
		call(t, vm, unsure, KDP_INFO, &info);
	}
}

/* Be a handler for a moment: resolve what we are told of, unless we are killed before. */
static void chaos_read(struct task *t, int vm)
{
	struct kdp_event ev[3];
	ssize_t got;

	log_op(&t->log, "read", vm, 0, 0, 0, 0);
	got = read(vm, ev, sizeof(ev));
	log_result(&t->log, got < 0 ? -errno : got);
	if (got < 0 && errno != EAGAIN && errno != EINTR)
		concurrent_fail(t->sh, &t->log, "read: %s", strerror(errno));
	for (ssize_t i = 0; i < got / (ssize_t)sizeof(ev[0]); i++) {
		bool absent = ev[i].type == KDP_EVENT_ABSENT;

		if ((!absent && ev[i].type != KDP_EVENT_SOURCE_ERROR) || !ev[i].deliveries ||
		    !ev[i].error != absent || ev[i].__reserved)
			concurrent_fail(t->sh, &t->log, "an event of type %u", ev[i].type);
		/* Those of checked memslots are for their owners, who resolve everything in time. */
		if (absent && ev[i].slot_id >= CHAOS_ID)
			kdp_mark(vm, ev[i].slot_id, KDP_STATE_PRESENT, ev[i].page, 1);
	}
}

static int table_fd(struct task *t)
{
	return table[pick(&t->r, 8)];
}

/* Replace a VM of the table: others may be in the middle of a call on it. */
static void table_replace(struct task *t)
{
	int fd = open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	int old = atomic_exchange(&table[pick(&t->r, 8)], fd);

	if (old >= 0)
		close(old);
}

static void table_op(struct task *t)
{
	if (!atomic_exchange(&table_ready, true))
		for (int i = 0; i < 8; i++)
			table[i] = -1;
	switch (pick(&t->r, 9)) {
	case 0:
		table_replace(t);
		break;
	case 1:
		chaos_create(t, table_fd(t), true, false);
		break;
	case 2:
		chaos_get(t, table_fd(t), true, false);
		break;
	case 3:
		chaos_mark(t, table_fd(t), true);
		break;
	case 4:
		chaos_source(t, table_fd(t), true);
		break;
	case 5:
		chaos_poison(t, table_fd(t), true);
		break;
	case 6:
		chaos_fill(t, table_fd(t), true);
		break;
	default:
		chaos_simple(t, table_fd(t), true);
	}
}

void chaos_op(struct task *t)
{
	int vm = t->sh->vm[pick(&t->r, NR_VMS)];

	switch (pick(&t->r, 15)) {
	case 0:
	case 1:
		chaos_create(t, vm, false, true);
		break;
	case 2:
		chaos_get(t, vm, false, true);
		break;
	case 3:
	case 4:
	case 5:
		chaos_mark(t, vm, false);
		break;
	case 6:
		chaos_bits(t, vm);
		break;
	case 7:
	case 8:
		chaos_simple(t, vm, false);
		break;
	case 9:
		chaos_read(t, vm);
		break;
	case 10:
		chaos_source(t, vm, false);
		break;
	case 11:
		chaos_poison(t, vm, false);
		break;
	case 12:
		chaos_fill(t, vm, false);
		break;
	default:
		table_op(t);
	}
}
