// SPDX-License-Identifier: GPL-2.0
/* Making, finding and removing memslots and VMs at random. */
#include <sys/mman.h>

#include "model.h"

#define TOP_GFN	(1ULL << 40)

static void spoil_create(struct model *m, struct kdp_memslot_create *a)
{
	switch (pick(&m->r, 9)) {
	case 0:
		a->nr_pages = nasty(&m->r);
		break;
	case 1:
		a->base_gfn = nasty(&m->r);
		break;
	case 2:
		a->memfd_offset = nasty(&m->r);
		break;
	case 3:
		a->memfd = -1;
		break;
	case 4:
		a->memfd = m->vm[0];
		break;
	case 5:
		a->memfd = m->mem[3].fd;
		break;
	case 6:
		a->__reserved = 1U << pick(&m->r, 32);
		break;
	case 7:
		a->name[pick(&m->r, KDP_NAME_LEN)] = rng_next(&m->r);
		break;
	case 8:
		a->memfd_offset += 1 + pick(&m->r, PAGE);
		break;
	}
}

static bool name_is_good(const __u8 *name)
{
	size_t len = strnlen((const char *)name, KDP_NAME_LEN);

	if (len == KDP_NAME_LEN || name[0] == '.')
		return false;
	for (size_t i = 0; i < len; i++)
		if (!(name[i] < 128 && ((name[i] | 32) >= 'a' && (name[i] | 32) <= 'z')) &&
		    !(name[i] >= '0' && name[i] <= '9') && !strchr("._-", name[i]))
			return false;
	for (size_t i = len; i < KDP_NAME_LEN; i++)
		if (name[i])
			return false;
	return true;
}

static void create_errs(struct model *m, int vm, const struct kdp_memslot_create *a,
			struct errs *errs)
{
	struct mem *mem = NULL;
	__u64 unit, end;

	for (int i = 0; i < NR_MEMS; i++)
		if (a->memfd == m->mem[i].fd)
			mem = &m->mem[i];
	may_fail(errs, a->__reserved, EOPNOTSUPP);
	may_fail(errs, a->memfd < 0, EBADF);
	may_fail(errs, a->memfd >= 0 && !mem, EINVAL);
	may_fail(errs, mem && !mem->sealed, EPERM);
	may_fail(errs, !a->nr_pages || a->nr_pages > KDP_MAX_PAGES, EINVAL);
	may_fail(errs, a->base_gfn > TOP_GFN || a->nr_pages > TOP_GFN - a->base_gfn, EINVAL);
	may_fail(errs, !name_is_good(a->name), EINVAL);
	unit = mem && mem->huge ? HUGE : PAGE;
	may_fail(errs, a->memfd_offset % unit || a->nr_pages * PAGE % unit, EINVAL);
	if (mem) {
		end = mem->pages * PAGE;
		may_fail(errs, a->memfd_offset > end ||
			 a->nr_pages > (end - a->memfd_offset) / PAGE, EINVAL);
	}
	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++) {
		if (s->life != LIFE_LISTED)
			continue;
		may_fail(errs, a->name[0] && !strncmp(s->name, (char *)a->name, KDP_NAME_LEN), EEXIST);
		may_fail(errs, s->vm == vm && (s->id == a->slot_id ||
			 (a->base_gfn < s->base + s->pages && s->base < a->base_gfn + a->nr_pages)),
			 EEXIST);
	}
}

void op_create(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct mem *mem = &m->mem[pick(&m->r, 3)];
	__u64 unit = mem->huge ? 512 : 1, units = mem->pages / unit;
	struct kdp_memslot_create a = KDP_ARG(kdp_memslot_create, .memfd = mem->fd);
	struct errs errs = { 0 };
	struct mslot *s = NULL;
	__u64 first;
	int err;

	for (int i = 0; i < NR_SLOTS; i++)
		if (!m->slot[i].life)
			s = &m->slot[i];
	if (!s)
		return;
	a.flags = some_flags(m, KDP_MEMSLOT_PAGING | KDP_MEMSLOT_POISON_SIGNAL, &errs);
	a.slot_id = some_id(m);
	a.base_gfn = pick(&m->r, 4096);
	first = pick(&m->r, units);
	a.nr_pages = (1 + pick(&m->r, units - first)) * unit;
	a.memfd_offset = first * unit * PAGE;
	a.fd = rng_next(&m->r);
	if (chance(&m->r, 30))
		snprintf((char *)a.name, KDP_NAME_LEN, "fuzz-%llu", pick(&m->r, 4));
	if (chance(&m->r, 20))
		spoil_create(m, &a);
	create_errs(m, vm, &a, &errs);
	log_op(&m->log, "create", vm, a.slot_id, a.base_gfn, a.nr_pages, a.memfd_offset);
	err = model_call(m, "KDP_MEMSLOT_CREATE", m->vm[vm], KDP_MEMSLOT_CREATE, &a, sizeof(a), &errs);
	if (err || m->failed)
		return;
	*s = (struct mslot){
		.life = LIFE_LISTED, .vm = vm, .id = a.slot_id, .base = a.base_gfn,
		.pages = a.nr_pages, .first = a.memfd_offset / PAGE,
		.paging = a.flags & KDP_MEMSLOT_PAGING, .fd = a.fd,
	};
	for (int i = 0; i < NR_MEMS; i++)
		if (a.memfd == m->mem[i].fd)
			s->mem = &m->mem[i];
	memcpy(s->name, a.name, KDP_NAME_LEN);
	s->guest = mmap(NULL, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
	s->bitmap = mmap(NULL, bitmap_bytes(s->pages), PROT_READ | PROT_WRITE, MAP_SHARED, s->fd,
			 KDP_BITMAP_OFFSET);
	if (!s->mem->huge)
		s->own = mmap(NULL, s->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, s->fd, 0);
	if (s->guest == MAP_FAILED || s->bitmap == MAP_FAILED || s->own == MAP_FAILED)
		model_fail(m, "a new memslot cannot be mapped: %s", strerror(errno));
}

void op_remove(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_memslot_remove a = KDP_ARG(kdp_memslot_remove, .slot_id = some_id(m));
	struct mslot *s = model_find(m, vm, a.slot_id);
	struct errs errs = { 0 };

	a.flags = some_flags(m, 0, &errs);
	a.__reserved = chance(&m->r, 3);
	may_fail(&errs, a.__reserved, EOPNOTSUPP);
	may_fail(&errs, !s, ENOENT);
	log_op(&m->log, "remove", vm, a.slot_id, a.flags, a.__reserved, 0);
	if (!model_call(m, "KDP_MEMSLOT_REMOVE", m->vm[vm], KDP_MEMSLOT_REMOVE, &a, sizeof(a), &errs) &&
	    s)
		s->life = LIFE_REMOVED;
}

void op_get(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_memslot_get a = KDP_ARG(kdp_memslot_get, .slot_id = some_id(m));
	struct errs errs = { 0 };
	struct mslot *s = NULL;
	__u32 want = a.slot_id;

	a.flags = some_flags(m, KDP_GET_NEXT | KDP_GET_FD | KDP_GET_MEMFD, &errs);
	for (struct mslot *c = m->slot; c < m->slot + NR_SLOTS; c++)
		if (c->life == LIFE_LISTED && c->vm == vm &&
		    (a.flags & KDP_GET_NEXT ? c->id >= want && (!s || c->id < s->id) : c->id == want))
			s = c;
	may_fail(&errs, !s, ENOENT);
	log_op(&m->log, "get", vm, a.slot_id, a.flags, 0, 0);
	if (model_call(m, "KDP_MEMSLOT_GET", m->vm[vm], KDP_MEMSLOT_GET, &a, sizeof(a), &errs) || m->failed)
		return;
	if (a.slot_id != s->id || a.paging != s->paging || a.base_gfn != s->base ||
	    a.nr_pages != s->pages || a.memfd_offset != s->first * PAGE ||
	    a.backing_page_size != (s->mem->huge ? HUGE : PAGE) ||
	    strncmp((char *)a.name, s->name, KDP_NAME_LEN) ||
	    (a.fd >= 0) != !!(a.flags & KDP_GET_FD) || (a.memfd >= 0) != !!(a.flags & KDP_GET_MEMFD))
		model_fail(m, "KDP_MEMSLOT_GET describes slot %u wrongly", s->id);
	if (a.fd >= 0) {
		/* From now on this one is the memslot's fd. */
		close(s->fd);
		s->fd = a.fd;
	}
	if (a.memfd >= 0)
		close(a.memfd);
}

void op_paging(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);
	struct kdp_paging a = KDP_ARG(kdp_paging, .slot_id = some_id(m), .mode = pick(&m->r, 3));
	struct mslot *s = model_find(m, vm, a.slot_id);
	struct errs errs = { 0 };

	a.flags = some_flags(m, 0, &errs);
	if (chance(&m->r, 3))
		a.mode = nasty(&m->r);
	may_fail(&errs, a.mode > KDP_PAGING_ON_PRESENT, EOPNOTSUPP);
	may_fail(&errs, !s, ENOENT);
	log_op(&m->log, "paging", vm, a.slot_id, a.mode, a.flags, 0);
	if (model_call(m, "KDP_PAGING", m->vm[vm], KDP_PAGING, &a, sizeof(a), &errs) || m->failed)
		return;
	for (__u64 page = 0; page < s->pages; page++) {
		/* A page that is known to hold nothing is filled before it is present. */
		if (a.mode != KDP_PAGING_ON && s->paging && s->state[page] == KDP_STATE_ZERO)
			model_zero_fill(s, page);
		s->state[page] = a.mode == KDP_PAGING_ON ? KDP_STATE_ABSENT : KDP_STATE_PRESENT;
		if (s->event[page])
			s->event[page] = EV_UNKNOWN;
	}
	s->paging = a.mode != KDP_PAGING_OFF;
}

void op_close_vm(struct model *m)
{
	int vm = pick(&m->r, NR_VMS);

	if (!chance(&m->r, 20))
		return;
	log_op(&m->log, "close", vm, 0, 0, 0, 0);
	close(m->vm[vm]);
	if (m->exits_vm == vm)
		m->exits_vm = -1;
	for (struct mslot *s = m->slot; s < m->slot + NR_SLOTS; s++)
		if (s->life == LIFE_LISTED && s->vm == vm)
			s->life = LIFE_ORPHAN;
	model_settle(m);
	m->vm[vm] = open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (m->vm[vm] < 0)
		model_fail(m, "open: %s", strerror(errno));
}

void op_forget(struct model *m)
{
	struct mslot *s = &m->slot[pick(&m->r, NR_SLOTS)];

	if (s->life != LIFE_REMOVED && s->life != LIFE_ORPHAN)
		return;
	log_op(&m->log, "forget", s->vm, s->id, s->life, 0, 0);
	model_forget(m, s);
}
