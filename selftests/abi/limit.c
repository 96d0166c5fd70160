// SPDX-License-Identifier: GPL-2.0
/*
 * Invariant 8, RLIMIT_MEMLOCK: pinned shmem pages are charged to the user who
 * opened the VM, against the limit that the creator of the memslot had.
 *
 * Each test uses users of its own, for what is pinned is counted per user.
 */
#include "test.h"

#define PAGES	64
#define LIMIT	16	/* pages */

/* Become this real user, still with root's capabilities: what is opened now is this user's. */
static void real_user(struct __test_metadata *_metadata, uid_t uid)
{
	ASSERT_EQ(0, setreuid(uid, 0));
}

static void limit_pages(struct __test_metadata *_metadata, rlim_t pages)
{
	struct rlimit lim = { pages * PAGE, pages * PAGE };

	ASSERT_EQ(0, setrlimit(RLIMIT_MEMLOCK, &lim));
}

/* Lose all capabilities, CAP_IPC_LOCK among them. */
static void drop(struct __test_metadata *_metadata, uid_t uid)
{
	ASSERT_EQ(0, setresuid(uid, uid, uid));
}

/* Touch the pages in order; how many could be had before one was refused. */
static int touch_all(struct slot *s)
{
	unsigned char val;
	__u64 page;

	for (page = 0; page < s->pages; page++)
		if (touch_read(s->guest + page * PAGE, &val))
			break;
	return page;
}

static struct slot present_slot(struct __test_metadata *_metadata, int vm, __u32 id)
{
	struct slot s = slot_new(_metadata, vm, id, PAGES, KDP_MEMSLOT_PAGING);

	EXPECT_MARK(PAGES, &s, KDP_STATE_PRESENT, 0, PAGES);
	return s;
}

/* An unprivileged user with a VM of its own and room for LIMIT pages. */
static int limited_vm(struct __test_metadata *_metadata, uid_t uid)
{
	int vm;

	real_user(_metadata, uid);
	vm = vm_open(_metadata);
	limit_pages(_metadata, LIMIT);
	drop(_metadata, uid);
	return vm;
}

TEST(limit_memlock_is_charged)
{
	int vm = limited_vm(_metadata, 40001);
	struct slot s = present_slot(_metadata, vm, 1);
	struct toucher t = { 0 };
	unsigned char val;

	EXPECT_EQ(LIMIT, touch_all(&s));
	EXPECT_EQ(SIGBUS, touch_write(s.guest + LIMIT * PAGE, 1));
	ASSERT_TRUE(toucher_start(&t, s.guest + LIMIT * PAGE, TOUCH_KERNEL));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(EFAULT, t.result);
	/* What is pinned stays usable, in further mappings too: it is charged once. */
	EXPECT_EQ(0, touch_write(s.guest, 7));
	s.guest = map_rw(_metadata, s.fd, PAGES * PAGE, 0);
	EXPECT_EQ(LIMIT, touch_all(&s));
	EXPECT_EQ(0, touch_read(s.guest, &val));
	EXPECT_EQ(7, val);
}

TEST(limit_memlock_with_paging_off)
{
	int vm = limited_vm(_metadata, 40002);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, 0);

	EXPECT_EQ(LIMIT, touch_all(&s));
}

TEST(limit_memlock_of_zero)
{
	struct slot s;
	int vm;

	real_user(_metadata, 40003);
	vm = vm_open(_metadata);
	limit_pages(_metadata, 0);
	drop(_metadata, 40003);
	s = present_slot(_metadata, vm, 1);
	EXPECT_EQ(0, touch_all(&s));
	/* A page that is known to be zero needs memory as well. */
	EXPECT_MARK(1, &s, KDP_STATE_ABSENT, 3, 1);
	EXPECT_MARK(1, &s, KDP_STATE_ZERO, 3, 1);
	EXPECT_EQ(SIGBUS, touch_write(s.guest + 3 * PAGE, 1));
}

TEST(limit_cap_ipc_lock_lifts)
{
	struct slot s;
	int vm;

	real_user(_metadata, 40004);
	vm = vm_open(_metadata);
	limit_pages(_metadata, 0);
	s = present_slot(_metadata, vm, 1);
	/* It is the creator's capability that counts, not that of who touches. */
	drop(_metadata, 40004);
	EXPECT_EQ(PAGES, touch_all(&s));
}

TEST(limit_is_that_of_the_creator)
{
	int vm = limited_vm(_metadata, 40005);
	struct slot s = present_slot(_metadata, vm, 1);

	limit_pages(_metadata, 2);
	EXPECT_EQ(LIMIT, touch_all(&s));
}

TEST(limit_is_that_of_the_creator_in_a_privileged_process)
{
	struct kdp_memslot_get get;
	struct slot s = { .id = 1, .pages = PAGES };
	pid_t child;

	real_user(_metadata, 40006);
	s.vm = vm_open(_metadata);
	touch_init();
	/* The child creates without privilege; we touch, with all of them and no limit. */
	child = fork();
	if (!child) {
		limit_pages(_metadata, LIMIT);
		drop(_metadata, 40007);
		present_slot(_metadata, s.vm, 1);
		_exit(_metadata->exit_code);
	}
	ASSERT_EQ(0, child_status(child));
	ASSERT_EQ(0, kdp_get(s.vm, 1, KDP_GET_FD, &get));
	s.guest = map_rw(_metadata, get.fd, PAGES * PAGE, 0);
	EXPECT_EQ(LIMIT, touch_all(&s));
}

TEST(limit_is_shared_by_a_users_vms)
{
	int vm_a, vm_b;
	struct slot a, b;

	real_user(_metadata, 40008);
	vm_a = vm_open(_metadata);
	vm_b = vm_open(_metadata);
	limit_pages(_metadata, LIMIT);
	drop(_metadata, 40008);
	a = present_slot(_metadata, vm_a, 1);
	b = present_slot(_metadata, vm_b, 1);
	a.pages = 10;
	EXPECT_EQ(10, touch_all(&a));
	EXPECT_EQ(LIMIT - 10, touch_all(&b));
	/* What the one gives back, the other can have. */
	EXPECT_MARK(4, &a, KDP_STATE_ABSENT, 0, 4);
	EXPECT_EQ(LIMIT - 6, touch_all(&b));
}

TEST(limit_is_per_user)
{
	int vm_a, vm_b;
	struct slot a, b;

	real_user(_metadata, 40009);
	vm_a = vm_open(_metadata);
	real_user(_metadata, 40010);
	vm_b = vm_open(_metadata);
	limit_pages(_metadata, LIMIT);
	drop(_metadata, 40010);
	/* One process, but the VMs were opened by different users: each has its own account. */
	a = present_slot(_metadata, vm_a, 1);
	b = present_slot(_metadata, vm_b, 1);
	EXPECT_EQ(LIMIT, touch_all(&a));
	EXPECT_EQ(LIMIT, touch_all(&b));
}

TEST(limit_is_given_back_by_absent)
{
	int vm = limited_vm(_metadata, 40011);
	struct slot s = present_slot(_metadata, vm, 1);

	EXPECT_EQ(LIMIT, touch_all(&s));
	EXPECT_MARK(LIMIT, &s, KDP_STATE_ABSENT, 0, LIMIT);
	/* The page that was refused can be had now, and as many as before. */
	s.guest += LIMIT * PAGE;
	s.pages = PAGES - LIMIT;
	EXPECT_EQ(LIMIT, touch_all(&s));
	/* Absent pages that were never pinned give nothing back. */
	EXPECT_MARK(PAGES - 2 * LIMIT, &s, KDP_STATE_ABSENT, 2 * LIMIT, PAGES - 2 * LIMIT);
	EXPECT_MARK(PAGES - 2 * LIMIT, &s, KDP_STATE_PRESENT, 2 * LIMIT, PAGES - 2 * LIMIT);
	EXPECT_EQ(LIMIT, touch_all(&s));
}

TEST(limit_is_given_back_by_remove)
{
	int vm = limited_vm(_metadata, 40012);

	for (__u32 id = 0; id < 5; id++) {
		struct slot s = present_slot(_metadata, vm, id);

		EXPECT_EQ(LIMIT, touch_all(&s));
		ASSERT_EQ(0, kdp_remove(vm, id));
	}
}

TEST(limit_is_given_back_with_the_vm)
{
	int status;
	pid_t child;

	for (int i = 0; i < 3; i++) {
		child = fork();
		if (!child) {
			int vm = limited_vm(_metadata, 40013);
			struct slot s = present_slot(_metadata, vm, 1);

			EXPECT_EQ(LIMIT, touch_all(&s));
			_exit(_metadata->exit_code);
		}
		status = child_status(child);
		EXPECT_EQ(0, status);
	}
}

/* Switching paging off has to fill zero pages, which takes memory that may not be there. */
TEST(limit_reached_by_paging_off_is_enomem)
{
	static const __u32 modes[] = { KDP_PAGING_OFF, KDP_PAGING_ON_PRESENT };
	int vm = limited_vm(_metadata, 40015);
	struct slot s = slot_new(_metadata, vm, 1, PAGES, KDP_MEMSLOT_PAGING);
	struct kdp_memslot_get get;
	struct toucher t = { 0 };

	EXPECT_MARK(PAGES - 1, &s, KDP_STATE_ZERO, 0, PAGES - 1);
	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(ENOMEM, kdp_paging(vm, 1, modes[i]));
		EXPECT_EQ(0, kdp_get(vm, 1, 0, &get));
		EXPECT_EQ(KDP_PAGING_ON, get.paging);
	}
	/* The absent page is still absent, and no more is pinned than is allowed. */
	EXPECT_FALSE(bit_get(s.bitmap, PAGES - 1));
	wait_begins(_metadata, &s, &t, PAGES - 1, TOUCH_READ);
	EXPECT_MARK(PAGES - 1, &s, KDP_STATE_ABSENT, 0, PAGES - 1);
	EXPECT_MARK(1, &s, KDP_STATE_PRESENT, PAGES - 1, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.result);
	EXPECT_EQ(0, kdp_paging(vm, 1, KDP_PAGING_OFF));
}

TEST(limit_hugetlb_is_not_charged)
{
	struct slot s;
	int vm;

	if (!hugetlb_reserve(2))
		SKIP(return, "no two free 2 MiB pages");
	real_user(_metadata, 40014);
	vm = vm_open(_metadata);
	limit_pages(_metadata, 0);
	drop(_metadata, 40014);
	s = slot_on(_metadata, vm, 1, 1024, KDP_MEMSLOT_PAGING, true);
	EXPECT_MARK(1024, &s, KDP_STATE_PRESENT, 0, 1024);
	EXPECT_EQ(1024, touch_all(&s));
}
