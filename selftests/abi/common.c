// SPDX-License-Identifier: GPL-2.0
/* What the ABI says of all ioctls: sizes, flags, reserved fields, unknown commands. */
#include "test.h"

#define SLOT	7
#define HUGE_SLOT	2
#define CLAIMED_SLOT	3
#define PAGES	64

union arg {
	struct {
		__u32 size;
		__u32 flags;
	};
	struct kdp_info info;
	struct kdp_memslot_create create;
	struct kdp_memslot_remove remove;
	struct kdp_memslot_get get;
	struct kdp_paging paging;
	struct kdp_mark mark;
	struct kdp_vcpu_exits exits;
	struct kdp_collapse collapse;
	struct kdp_source source;
	struct kdp_poison poison;
	struct kdp_poison_list list;
	struct kdp_replace replace;
	struct kdp_place place;
	struct kdp_claimant claimant;
	struct kdp_claim claim;
	struct kdp_memfd memfd;
	unsigned char bytes[2 * PAGE];
};

static const struct call {
	const char *name;
	unsigned long cmd;
	__u32 size;
	__u32 flags;	/* those that the call knows */
	bool writes;	/* it has fields that it fills */
	bool claimants;	/* it is for a claimant's fd */
} calls[] = {
	{ "KDP_INFO", KDP_INFO, sizeof(struct kdp_info), 0, true, false },
	{ "KDP_MEMSLOT_CREATE", KDP_MEMSLOT_CREATE, sizeof(struct kdp_memslot_create),
	  KDP_MEMSLOT_PAGING | KDP_MEMSLOT_POISON_SIGNAL, true, false },
	{ "KDP_MEMSLOT_REMOVE", KDP_MEMSLOT_REMOVE, sizeof(struct kdp_memslot_remove), 0, false, false },
	{ "KDP_MEMSLOT_GET", KDP_MEMSLOT_GET, sizeof(struct kdp_memslot_get),
	  KDP_GET_NEXT | KDP_GET_FD | KDP_GET_MEMFD, true, false },
	{ "KDP_PAGING", KDP_PAGING, sizeof(struct kdp_paging), 0, false, false },
	{ "KDP_MARK", KDP_MARK, sizeof(struct kdp_mark), 0, true, false },
	{ "KDP_VCPU_EXITS", KDP_VCPU_EXITS, sizeof(struct kdp_vcpu_exits), 0, false, false },
	{ "KDP_COLLAPSE", KDP_COLLAPSE, sizeof(struct kdp_collapse), 0, true, false },
	{ "KDP_SOURCE", KDP_SOURCE, sizeof(struct kdp_source), KDP_SOURCE_ADD, false, false },
	{ "KDP_POISON", KDP_POISON, sizeof(struct kdp_poison), KDP_POISON_HEAL, true, false },
	{ "KDP_POISON_LIST", KDP_POISON_LIST, sizeof(struct kdp_poison_list), 0, true, false },
	{ "KDP_REPLACE", KDP_REPLACE, sizeof(struct kdp_replace), 0, true, false },
	{ "KDP_PLACE", KDP_PLACE, sizeof(struct kdp_place), 0, true, false },
	{ "KDP_CLAIMANT", KDP_CLAIMANT, sizeof(struct kdp_claimant), 0, true, false },
	{ "KDP_CLAIM", KDP_CLAIM, sizeof(struct kdp_claim), 0, true, true },
	{ "KDP_COMMIT", KDP_COMMIT, sizeof(struct kdp_claim), KDP_COMMIT_ABANDON, true, true },
	{ "KDP_MEMFD", KDP_MEMFD, sizeof(struct kdp_memfd), 0, true, false },
};

#define for_each_call(c) \
	for (const struct call *c = calls; c < calls + ARRAY_SIZE(calls); c++)

#define fd_of(c) ((c)->claimants ? self->claimant : self->vm)

FIXTURE(abi) {
	int vm;
	int memfd;
	int huge_memfd;
	int claimant;
	__u32 next_id;
	bool has_exits;
	bool has_memfd;
	struct kdp_range range;
	struct kdp_poisoned poisoned;
	unsigned char data[PAGE];
	union arg *arg;		/* followed by a page that nobody can touch */
	unsigned char *wall;	/* that page */
};

/* Of a memslot of its own, which no other call here changes. */
static int claimant_open(struct __test_metadata *_metadata, int vm)
{
	struct kdp_claimant arg = KDP_ARG(kdp_claimant, .slot_id = CLAIMED_SLOT);

	slot_new(_metadata, vm, CLAIMED_SLOT, PAGES, KDP_MEMSLOT_PAGING);
	ASSERT_EQ(0, kdp_ioctl(vm, KDP_CLAIMANT, &arg));
	return arg.fd;
}

FIXTURE_SETUP(abi)
{
	struct kdp_info info;

	self->vm = vm_open(_metadata);
	self->memfd = memfd_shmem(PAGES);
	self->next_id = 100;
	self->range = (struct kdp_range){ 0, 1 };
	self->arg = mmap(NULL, sizeof(*self->arg) + PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->arg);
	self->wall = (unsigned char *)(self->arg + 1);
	ASSERT_EQ(0, mprotect(self->wall, PAGE, PROT_NONE));
	ASSERT_EQ(0, kdp_info(self->vm, &info));
	self->has_exits = info.features & KDP_FEATURE_EXITS;
	self->has_memfd = info.features & KDP_FEATURE_MEMFD;
	slot_new(_metadata, self->vm, SLOT, PAGES, KDP_MEMSLOT_PAGING);
	self->claimant = claimant_open(_metadata, self->vm);
	self->huge_memfd = memfd_sealed(MFD_HUGETLB | MFD_HUGE_2MB, 512, F_SEAL_SHRINK);
	if (self->huge_memfd >= 0) {
		struct kdp_memslot_create create = good_create(_metadata, HUGE_SLOT, 512);

		create.memfd = memfd_sealed(MFD_HUGETLB | MFD_HUGE_2MB, 512, F_SEAL_SHRINK);
		ASSERT_EQ(0, kdp_create(self->vm, &create));
		close(create.memfd);
	}
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

/* An argument with which the call succeeds. */
static void good(struct __test_metadata *_metadata, struct _test_data_abi *self,
		 const struct call *c, union arg *a)
{
	memset(a, 0, sizeof(*a));
	a->size = c->size;
	switch (c->cmd) {
	case KDP_MEMSLOT_CREATE:
		a->create.memfd = self->memfd;
		a->create.nr_pages = PAGES;
		a->create.slot_id = self->next_id++;
		a->create.base_gfn = slot_base(a->create.slot_id);
		break;
	case KDP_MEMSLOT_REMOVE: {
		struct kdp_memslot_create create = good_create(_metadata, self->next_id++, 1);

		ASSERT_EQ(0, kdp_create(self->vm, &create));
		close(create.fd);
		close(create.memfd);
		a->remove.slot_id = create.slot_id;
		break;
	}
	case KDP_MEMSLOT_GET:
		a->get.slot_id = SLOT;
		break;
	case KDP_PAGING:
		a->paging.slot_id = SLOT;
		a->paging.mode = KDP_PAGING_ON;
		break;
	case KDP_MARK:
		a->mark.slot_id = SLOT;
		a->mark.state = KDP_STATE_PRESENT;
		a->mark.ranges = (uintptr_t)&self->range;
		a->mark.nr_ranges = 1;
		break;
	case KDP_VCPU_EXITS:
		a->exits.mode = KDP_EXITS_OFF;
		break;
	case KDP_COLLAPSE:
		a->collapse.slot_id = SLOT;
		a->collapse.count = PAGES;
		break;
	case KDP_SOURCE:
		a->source.slot_id = SLOT;
		a->source.fd = -1;
		break;
	case KDP_POISON:
		a->poison.slot_id = SLOT;
		a->poison.cause = KDP_CAUSE_INHERITED;
		a->poison.ranges = (uintptr_t)&self->range;
		a->poison.nr_ranges = 1;
		break;
	case KDP_POISON_LIST:
		a->list.slot_id = SLOT;
		a->list.count = 1;
		a->list.poisoned = (uintptr_t)&self->poisoned;
		break;
	case KDP_REPLACE:
		a->replace.slot_id = HUGE_SLOT;
		a->replace.memfd = self->huge_memfd;
		break;
	case KDP_PLACE:
		a->place.slot_id = SLOT;
		a->place.first = 1;
		a->place.count = 1;
		a->place.data = (uintptr_t)self->data;
		break;
	case KDP_CLAIMANT:
		a->claimant.slot_id = SLOT;
		break;
	case KDP_CLAIM:
	case KDP_COMMIT:
		a->claim.count = 1;
		break;
	case KDP_MEMFD:
		a->memfd.length = PAGE;
		break;
	}
}

/* What a call comes to in which nothing is wrong: there is no memory error to replace a page for. */
#define ends(c) ((c)->cmd == KDP_REPLACE ? ENXIO : 0)

/*
 * Some calls have no valid argument on some hosts:
 * - KDP_VCPU_EXITS without KVM,
 * - KDP_REPLACE without hugetlb,
 * - KDP_MEMFD without transparent huge pages.
 */
#define skip_call(c) (((c)->cmd == KDP_VCPU_EXITS && !self->has_exits) ||	\
		      ((c)->cmd == KDP_MEMFD && !self->has_memfd) ||		\
		      ((c)->cmd == KDP_REPLACE && self->huge_memfd < 0))

TEST_F(abi, size_exact)
{
	for_each_call(c) {
		if (skip_call(c))
			continue;
		good(_metadata, self, c, self->arg);
		EXPECT_EQ(ends(c), kdp_ioctl(fd_of(c), c->cmd, self->arg)) TH_LOG("%s", c->name);
	}
}

TEST_F(abi, size_below_is_einval)
{
	for_each_call(c)
		for (__u32 size = 0; size < c->size; size++) {
			good(_metadata, self, c, self->arg);
			self->arg->size = size;
			EXPECT_EQ(EINVAL, kdp_ioctl(fd_of(c), c->cmd, self->arg))
				TH_LOG("%s, size %u", c->name, size);
		}
}

TEST_F(abi, size_above_with_zero_tail)
{
	for_each_call(c) {
		const __u32 sizes[] = { c->size + 1, c->size + 3, c->size + 8, c->size + 511, PAGE };

		for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
			if (skip_call(c))
				continue;
			good(_metadata, self, c, self->arg);
			self->arg->size = sizes[i];
			EXPECT_EQ(ends(c), kdp_ioctl(fd_of(c), c->cmd, self->arg))
				TH_LOG("%s, size %u", c->name, sizes[i]);
		}
	}
}

/* No struct is ever longer than a page; a larger size is not looked through for zeros. */
TEST_F(abi, size_above_a_page_is_e2big)
{
	const __u32 sizes[] = { PAGE + 1, 2 * PAGE, 0x7fffffff, 0x80000000, 0xffffffff };

	for_each_call(c)
		for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
			good(_metadata, self, c, self->arg);
			self->arg->size = sizes[i];
			EXPECT_EQ(E2BIG, kdp_ioctl(fd_of(c), c->cmd, self->arg))
				TH_LOG("%s, size %u", c->name, sizes[i]);
		}
}

TEST_F(abi, size_above_with_nonzero_tail_is_e2big)
{
	const __u32 at[] = { 0, 1, 7, 8, 300, 3000 };

	for_each_call(c)
		for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
			good(_metadata, self, c, self->arg);
			self->arg->size = PAGE;
			self->arg->bytes[c->size + at[i]] = 1;
			EXPECT_EQ(E2BIG, kdp_ioctl(fd_of(c), c->cmd, self->arg))
				TH_LOG("%s, nonzero byte %u after its end", c->name, at[i]);
			/* Beyond the size nobody may look. */
			self->arg->size = c->size + at[i];
			if (!skip_call(c)) {
				EXPECT_EQ(ends(c), kdp_ioctl(fd_of(c), c->cmd, self->arg))
					TH_LOG("%s, %u bytes too long", c->name, at[i]);
			}
		}
}

TEST_F(abi, size_above_into_unmapped_memory_is_efault)
{
	for_each_call(c) {
		const __u32 sizes[] = { c->size + 1, c->size + 8, PAGE };
		union arg *a = (union arg *)(self->wall - c->size);

		for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
			good(_metadata, self, c, self->arg);
			memmove(a, self->arg, c->size);
			a->size = sizes[i];
			EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, a))
				TH_LOG("%s, size %u", c->name, a->size);
		}
	}
}

TEST_F(abi, arg_unmapped_is_efault)
{
	for_each_call(c) {
		EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, NULL)) TH_LOG("%s", c->name);
		EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, self->wall)) TH_LOG("%s", c->name);
		EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, (void *)0xffff888000000000UL))
			TH_LOG("%s", c->name);
		EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, (void *)-4096L))
			TH_LOG("%s", c->name);
		/* Its beginning is there, its end is not. */
		for (__u32 there = 1; there < c->size; there++) {
			unsigned char *a = self->wall - there;

			good(_metadata, self, c, self->arg);
			memmove(a, self->arg, there);
			EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, a))
				TH_LOG("%s, %u bytes mapped", c->name, there);
		}
	}
}

TEST_F(abi, arg_readonly_is_efault_and_leaves_nothing)
{
	struct kdp_memslot_get get;
	int fds;

	ASSERT_EQ(0, kdp_remove(self->vm, SLOT));
	slot_new(_metadata, self->vm, SLOT, PAGES, KDP_MEMSLOT_PAGING);
	for_each_call(c) {
		if (!c->writes)
			continue;
		good(_metadata, self, c, self->arg);
		if (c->cmd == KDP_MEMSLOT_GET)
			self->arg->get.flags = KDP_GET_FD | KDP_GET_MEMFD;
		ASSERT_EQ(0, mprotect(self->arg, sizeof(*self->arg), PROT_READ));
		fds = open_fds();
		EXPECT_EQ(EFAULT, kdp_ioctl(fd_of(c), c->cmd, self->arg)) TH_LOG("%s", c->name);
		EXPECT_EQ(fds, open_fds()) TH_LOG("%s left a descriptor", c->name);
		ASSERT_EQ(0, mprotect(self->arg, sizeof(*self->arg), PROT_READ | PROT_WRITE));
	}
	/* The memslot that KDP_MEMSLOT_CREATE did not tell of does not exist. */
	EXPECT_EQ(ENOENT, kdp_get(self->vm, SLOT + 1, KDP_GET_NEXT, &get));
}

/* A call that tells nothing needs no more than to read its argument. */
TEST_F(abi, arg_readonly_is_enough_without_outputs)
{
	for_each_call(c) {
		if (c->writes || skip_call(c))
			continue;
		good(_metadata, self, c, self->arg);
		ASSERT_EQ(0, mprotect(self->arg, sizeof(*self->arg), PROT_READ));
		EXPECT_EQ(ends(c), kdp_ioctl(fd_of(c), c->cmd, self->arg)) TH_LOG("%s", c->name);
		ASSERT_EQ(0, mprotect(self->arg, sizeof(*self->arg), PROT_READ | PROT_WRITE));
	}
}

TEST_F(abi, flags_unknown_is_eopnotsupp)
{
	for_each_call(c)
		for (int bit = 0; bit < 32; bit++) {
			if (c->flags & (1U << bit))
				continue;
			good(_metadata, self, c, self->arg);
			self->arg->flags |= 1U << bit;
			EXPECT_EQ(EOPNOTSUPP, kdp_ioctl(fd_of(c), c->cmd, self->arg))
				TH_LOG("%s, flag bit %d", c->name, bit);
		}
}

TEST_F(abi, reserved_nonzero_is_eopnotsupp)
{
	for_each_call(c) {
		good(_metadata, self, c, self->arg);
		switch (c->cmd) {
		case KDP_MEMSLOT_CREATE:
			self->arg->create.__reserved = 1;
			break;
		case KDP_MEMSLOT_REMOVE:
			self->arg->remove.__reserved = 0x80000000;
			break;
		case KDP_VCPU_EXITS:
			self->arg->exits.__reserved = 1;
			break;
		case KDP_COLLAPSE:
			self->arg->collapse.__reserved = 1;
			break;
		case KDP_SOURCE:
			self->arg->source.__reserved = 1;
			break;
		case KDP_PLACE:
			self->arg->place.__reserved = 1;
			break;
		default:
			continue;
		}
		EXPECT_EQ(EOPNOTSUPP, kdp_ioctl(fd_of(c), c->cmd, self->arg)) TH_LOG("%s", c->name);
	}
}

TEST_F(abi, mode_unknown_is_eopnotsupp)
{
	const __u32 modes[] = { 3, 4, 0x80000000, 0xffffffff };

	for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
		EXPECT_EQ(EOPNOTSUPP, kdp_paging(self->vm, SLOT, modes[i]));
		EXPECT_EQ(EOPNOTSUPP, kdp_mark(self->vm, SLOT, modes[i], 0, 1).err);
		EXPECT_EQ(EOPNOTSUPP, kdp_exits(self->vm, modes[i]));
	}
	EXPECT_EQ(EOPNOTSUPP, kdp_exits(self->vm, 2));
}

TEST_F(abi, slot_unknown_is_enoent)
{
	const __u32 ids[] = { 0, SLOT - 1, SLOT + 1, 0x80000000, 0xffffffff };
	struct kdp_memslot_get get;
	struct kdp_collapse collapse;

	for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
		EXPECT_EQ(ENOENT, kdp_collapse(self->vm, ids[i], 0, 1, &collapse));
		EXPECT_EQ(ENOENT, kdp_source(self->vm, ids[i], -1, 0, NULL, 0));
		EXPECT_EQ(ENOENT, kdp_remove(self->vm, ids[i]));
		EXPECT_EQ(ENOENT, kdp_get(self->vm, ids[i], 0, &get));
		EXPECT_EQ(ENOENT, kdp_paging(self->vm, ids[i], KDP_PAGING_ON));
		EXPECT_EQ(ENOENT, kdp_mark(self->vm, ids[i], KDP_STATE_PRESENT, 0, 1).err);
	}
}

TEST_F(abi, ioctl_unknown_is_enotty)
{
	for (unsigned int nr = 0; nr < 256; nr++) {
		if (nr < _IOC_NR(KDP_INFO) || nr > _IOC_NR(KDP_MEMFD)) {
			EXPECT_EQ(ENOTTY, kdp_ioctl(self->vm, _IO(KDP_IOC_TYPE, nr), self->arg))
				TH_LOG("nr %#x", nr);
		}
		/* The file system layer knows some of the other types. */
		EXPECT_EQ(ENOTTY, kdp_ioctl(self->vm, _IO(KDP_IOC_TYPE ^ 1, nr), self->arg))
			TH_LOG("nr %#x of another type", nr);
	}
	for_each_call(c) {
		good(_metadata, self, c, self->arg);
		EXPECT_EQ(ENOTTY, kdp_ioctl(fd_of(c), c->cmd | _IOC(_IOC_WRITE, 0, 0, 8), self->arg))
			TH_LOG("%s with a direction and a size", c->name);
	}
}

TEST_F(abi, ioctl_on_memslot_fd_is_enotty)
{
	struct kdp_memslot_get get;

	ASSERT_EQ(0, kdp_get(self->vm, SLOT, KDP_GET_FD, &get));
	for_each_call(c) {
		good(_metadata, self, c, self->arg);
		EXPECT_EQ(ENOTTY, kdp_ioctl(get.fd, c->cmd, self->arg)) TH_LOG("%s", c->name);
	}
}

TEST_F(abi, ioctl_on_dup_is_the_same_vm)
{
	int dup_fd = dup(self->vm);
	struct kdp_memslot_get get;

	ASSERT_LE(0, dup_fd);
	EXPECT_EQ(0, kdp_get(dup_fd, SLOT, 0, &get));
	ASSERT_EQ(0, close(self->vm));
	EXPECT_EQ(0, kdp_get(dup_fd, SLOT, 0, &get));
	self->vm = dup_fd;
}

TEST_F(abi, vms_are_independent)
{
	int other = vm_open(_metadata);
	struct kdp_memslot_create arg = good_create(_metadata, SLOT, PAGES);
	struct kdp_memslot_get get;

	EXPECT_EQ(ENOENT, kdp_get(other, SLOT, 0, &get));
	/* The same id and the same GFNs are free in another VM. */
	EXPECT_EQ(0, kdp_create(other, &arg));
	EXPECT_EQ(0, kdp_remove(self->vm, SLOT));
	EXPECT_EQ(0, kdp_get(other, SLOT, 0, &get));
	close(other);
}

TEST_F(abi, arg_in_absent_page)
{
	struct slot s = slot_new(_metadata, self->vm, 50, PAGES, KDP_MEMSLOT_PAGING);

	/*
	 * The argument itself lies in guest memory that has to be fetched: a
	 * module that took a lock first would hang here.
	 */
	for_each_call(c) {
		struct kdp_event ev;
		pid_t child;

		if (skip_call(c))
			continue;
		EXPECT_MARK(c == calls ? 0 : 1, &s, KDP_STATE_ABSENT, 0, 1);
		good(_metadata, self, c, self->arg);
		memcpy(s.alias, self->arg, c->size);
		child = fork();
		if (!child)
			_exit(kdp_ioctl(fd_of(c), c->cmd, s.guest));
		ev = event_read(_metadata, self->vm);
		EXPECT_EQ(50, ev.slot_id);
		EXPECT_EQ(KDP_ACCESS_KERNEL, ev.access & (KDP_ACCESS_USER | KDP_ACCESS_KERNEL |
							  KDP_ACCESS_GUEST));
		EXPECT_MARK(1, &s, KDP_STATE_PRESENT, 0, 1);
		EXPECT_EQ(ends(c), child_status(child)) TH_LOG("%s", c->name);
	}
}
