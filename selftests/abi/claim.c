// SPDX-License-Identifier: GPL-2.0
/* KDP_CLAIMANT, KDP_CLAIM and KDP_COMMIT: pages that are filled past the module, by one alone. */
#include "test.h"

#define PAGES	1024

FIXTURE(abi_claim) {
	int vm;
	int fd;
	struct slot s;
	bool hugetlb;
};

FIXTURE_VARIANT(abi_claim) {
	bool hugetlb;
};

FIXTURE_VARIANT_ADD(abi_claim, shmem) { .hugetlb = false };
FIXTURE_VARIANT_ADD(abi_claim, hugetlb) { .hugetlb = true };

static int claimant(int vm, __u32 id)
{
	struct kdp_claimant arg = KDP_ARG(kdp_claimant, .slot_id = id, .fd = -77);
	int err = kdp_ioctl(vm, KDP_CLAIMANT, &arg);

	return err ? -err : arg.fd;
}

FIXTURE_SETUP(abi_claim)
{
	if (variant->hugetlb && !hugetlb_reserve(2))
		SKIP(return, "no free huge pages");
	self->vm = vm_open(_metadata);
	self->s = slot_on(_metadata, self->vm, 1, PAGES, KDP_MEMSLOT_PAGING, variant->hugetlb);
	self->fd = claimant(self->vm, 1);
	ASSERT_LE(0, self->fd);
}

FIXTURE_TEARDOWN(abi_claim)
{
	close(self->fd);
	close(self->vm);
}

static int claim_call(int fd, unsigned long cmd, __u32 flags, __u64 first, __u64 count, void *results,
		      struct kdp_claim *arg)
{
	*arg = KDP_ARG(kdp_claim, .flags = flags, .first = first, .count = count,
		       .results = (uintptr_t)results, .done = 77, .changed = 77);
	return kdp_ioctl(fd, cmd, arg);
}

#define EXPECT_CALL(err_, done_, changed_, fd_, cmd_, flags_, first_, count_, results_) do {	\
	struct kdp_claim a_;									\
	EXPECT_EQ(err_, claim_call(fd_, cmd_, flags_, first_, count_, results_, &a_));		\
	EXPECT_EQ((__u64)(done_), a_.done);							\
	EXPECT_EQ((__u64)(changed_), a_.changed);						\
} while (0)

/* All pages are dealt with; so many as the call is for. */
#define EXPECT_CLAIM(changed_, fd_, first_, count_, results_) \
	EXPECT_CALL(0, count_, changed_, fd_, KDP_CLAIM, 0, first_, count_, results_)
#define EXPECT_COMMIT(changed_, fd_, first_, count_, results_) \
	EXPECT_CALL(0, count_, changed_, fd_, KDP_COMMIT, 0, first_, count_, results_)
#define EXPECT_ABANDON(changed_, fd_, first_, count_, results_) \
	EXPECT_CALL(0, count_, changed_, fd_, KDP_COMMIT, KDP_COMMIT_ABANDON, first_, count_, results_)

/* One page, and what became of it. */
static int fate(int fd, unsigned long cmd, __u32 flags, __u64 page)
{
	unsigned char result = 0xff;
	struct kdp_claim arg;
	int err = claim_call(fd, cmd, flags, page, 1, &result, &arg);

	return err ? -err : result;
}

static int placed(int vm, __u64 page, const void *data)
{
	unsigned char result = 0xff;
	struct kdp_place arg = KDP_ARG(kdp_place, .slot_id = 1, .first = page, .count = 1,
				       .data = (uintptr_t)data, .results = (uintptr_t)&result);
	int err = kdp_ioctl(vm, KDP_PLACE, &arg);

	return err ? -err : result;
}

#define FATE(cmd_, page_)	fate(self->fd, cmd_, 0, page_)

TEST_F(abi_claim, claimed_pages_are_committed_once)
{
	unsigned char results[6];
	int other = claimant(self->vm, 1);

	EXPECT_CLAIM(3, self->fd, 62, 3, NULL);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 61, 1);
	memset(results, 0xff, sizeof(results));
	EXPECT_CLAIM(2, other, 61, 6, results);
	EXPECT_EQ(0, memcmp(results, ((unsigned char[]){ KDP_CLAIM_PRESENT, KDP_CLAIM_TAKEN,
		KDP_CLAIM_TAKEN, KDP_CLAIM_TAKEN, KDP_CLAIM_DONE, KDP_CLAIM_DONE }), 6));
	/* It is no other when it is the same who asks. */
	EXPECT_EQ(KDP_CLAIM_TAKEN, FATE(KDP_CLAIM, 62));
	memset(self->s.alias + 62 * PAGE, 7, 3 * PAGE);
	for (int page = 62; page < 67; page++)
		EXPECT_EQ(0, bit_get(self->s.bitmap, page));
	memset(results, 0xff, sizeof(results));
	EXPECT_COMMIT(3, self->fd, 61, 6, results);
	EXPECT_EQ(0, memcmp(results, ((unsigned char[]){ KDP_CLAIM_VOID, KDP_CLAIM_DONE,
		KDP_CLAIM_DONE, KDP_CLAIM_DONE, KDP_CLAIM_VOID, KDP_CLAIM_VOID }), 6));
	EXPECT_BYTE(7, self->s.guest + 64 * PAGE + 4095);
	for (int page = 62; page < 65; page++)
		EXPECT_EQ(1, bit_get(self->s.bitmap, page));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 65));
	EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 62));
	close(other);
}

TEST_F(abi_claim, place_and_mark_leave_claimed_pages_alone)
{
	unsigned char *data = self->s.alias;

	EXPECT_CLAIM(2, self->fd, 100, 2, NULL);
	EXPECT_EQ(KDP_PLACED_CLAIMED, placed(self->vm, 100, data));
	EXPECT_MARK(2, &self->s, KDP_STATE_PRESENT, 99, 4);
	EXPECT_EQ(0, bit_get(self->s.bitmap, 100));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 101));
	EXPECT_MARK(0, &self->s, KDP_STATE_ZERO, 100, 2);
	EXPECT_COMMIT(1, self->fd, 100, 1, NULL);
	EXPECT_ABANDON(1, self->fd, 101, 1, NULL);
	/* It is not zero. */
	EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 101, 1);
	EXPECT_EQ(KDP_PLACED_NOW, placed(self->vm, 101, data));
}

/* A touch neither fills a claimed page with zeros nor ends the claim: it waits, to what is committed. */
TEST_F(abi_claim, zero_page_is_absent_while_it_is_claimed)
{
	struct toucher t = { 0 };

	EXPECT_MARK(2, &self->s, KDP_STATE_ZERO, 200, 2);
	EXPECT_CLAIM(2, self->fd, 200, 2, NULL);
	wait_begins(_metadata, &self->s, &t, 200, TOUCH_READ);
	memset(self->s.alias + 200 * PAGE, 9, PAGE);
	EXPECT_COMMIT(1, self->fd, 200, 1, NULL);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(9, t.val);
	/* What was written to it before it was given up does not show. */
	memset(self->s.alias + 201 * PAGE, 9, PAGE);
	wait_begins(_metadata, &self->s, &t, 201, TOUCH_READ);
	EXPECT_ABANDON(1, self->fd, 201, 1, NULL);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.val);
	EXPECT_FALSE(event_pending(self->vm, 0));
}

TEST_F(abi_claim, sourced_page_is_absent_while_it_is_claimed)
{
	struct toucher t = { 0 };
	unsigned char page[PAGE];
	int file = memfd_shmem(PAGES);

	memset(page, 0xcd, PAGE);
	for (int i = 300; i < 302; i++)
		ASSERT_EQ(PAGE, pwrite(file, page, PAGE, i * PAGE));
	ASSERT_EQ(0, kdp_source(self->vm, 1, file, 0, NULL, 0));
	EXPECT_CLAIM(2, self->fd, 300, 2, NULL);
	wait_begins(_metadata, &self->s, &t, 300, TOUCH_READ);
	memset(self->s.alias + 300 * PAGE, 9, 2 * PAGE);
	EXPECT_COMMIT(1, self->fd, 300, 1, NULL);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(9, t.val);
	wait_begins(_metadata, &self->s, &t, 301, TOUCH_READ);
	EXPECT_ABANDON(1, self->fd, 301, 1, NULL);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0xcd, t.val);
	close(file);
}

/* Whoever has read the event may have left the page to the claimant. */
TEST_F(abi_claim, abandoned_page_makes_a_new_event)
{
	struct toucher t = { 0 };
	struct kdp_event ev;

	EXPECT_CLAIM(1, self->fd, 400, 1, NULL);
	wait_begins(_metadata, &self->s, &t, 400, TOUCH_READ);
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_ABANDON(1, self->fd, 400, 1, NULL);
	ev = event_read(_metadata, self->vm);
	EXPECT_EQ(400, ev.page);
	EXPECT_EQ(1, ev.waiters);
	memset(self->s.alias + 400 * PAGE, 5, PAGE);
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 400, 1);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(5, t.val);
}

/* A mark wakes who waits for other pages of its range, and not who waits for a claimed one. */
TEST_F(abi_claim, mark_wakes_around_claimed_pages)
{
	struct toucher t = { 0 }, claimed = { 0 };

	EXPECT_CLAIM(1, self->fd, 410, 1, NULL);
	wait_begins(_metadata, &self->s, &claimed, 410, TOUCH_READ);
	wait_begins(_metadata, &self->s, &t, 411, TOUCH_READ);
	EXPECT_MARK(9, &self->s, KDP_STATE_PRESENT, 405, 10);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_FALSE(event_pending(self->vm, QUIET_MS));
	EXPECT_COMMIT(1, self->fd, 410, 1, NULL);
	ASSERT_TRUE(toucher_join(&claimed));
}

TEST_F(abi_claim, close_gives_up_what_is_not_committed)
{
	int other = claimant(self->vm, 1), again = dup(other);
	struct toucher t = { 0 };

	EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 512, 1);
	EXPECT_CLAIM(512, other, 500, 512, NULL);
	EXPECT_COMMIT(1, other, 500, 1, NULL);
	wait_begins(_metadata, &self->s, &t, 512, TOUCH_READ);
	close(other);
	EXPECT_EQ(KDP_CLAIM_TAKEN, FATE(KDP_CLAIM, 501));
	close(again);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0, t.val);
	EXPECT_CLAIM(510, self->fd, 500, 512, NULL);
}

/* A process that dies leaves nothing claimed. */
TEST_F(abi_claim, death_gives_up_what_is_not_committed)
{
	pid_t child = fork();
	struct toucher t = { 0 };

	if (!child) {
		int own = claimant(self->vm, 1);
		struct kdp_claim arg;

		if (own < 0 || claim_call(own, KDP_CLAIM, 0, 0, PAGES, NULL, &arg))
			_exit(1);
		kill(getpid(), SIGKILL);
	}
	EXPECT_EQ(child, waitpid(child, NULL, 0));
	wait_begins(_metadata, &self->s, &t, 3, TOUCH_READ);
	EXPECT_CLAIM(PAGES, self->fd, 0, PAGES, NULL);
	EXPECT_COMMIT(PAGES, self->fd, 0, PAGES, NULL);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(abi_claim, absent_makes_it_void)
{
	struct toucher t = { 0 };

	EXPECT_CLAIM(3, self->fd, 600, 3, NULL);
	wait_begins(_metadata, &self->s, &t, 601, TOUCH_READ);
	EXPECT_MARK(0, &self->s, KDP_STATE_ABSENT, 600, 2);
	/* Who was told "claimed" may have left it alone. */
	EXPECT_EQ(601, event_read(_metadata, self->vm).page);
	EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 600));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 600));
	/* Another one may have it now: it is not the first one's to commit. */
	EXPECT_EQ(KDP_CLAIM_DONE, FATE(KDP_CLAIM, 601));
	EXPECT_COMMIT(2, self->fd, 601, 2, NULL);
	ASSERT_TRUE(toucher_join(&t));
}

TEST_F(abi_claim, poison_makes_it_void)
{
	EXPECT_CLAIM(2, self->fd, 620, 2, NULL);
	EXPECT_EQ(0, kdp_poison(self->vm, 1, 620, 1).err);
	EXPECT_EQ(KDP_CLAIM_LOST, FATE(KDP_CLAIM, 620));
	EXPECT_EQ(KDP_CLAIM_LOST, FATE(KDP_COMMIT, 620));
	EXPECT_EQ(KDP_CLAIM_DONE, FATE(KDP_COMMIT, 621));
	EXPECT_EQ(0, kdp_heal(self->vm, 1, 620, 1).err);
	EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 620));
	EXPECT_EQ(0, bit_get(self->s.bitmap, 620));
	EXPECT_EQ(KDP_CLAIM_DONE, FATE(KDP_CLAIM, 620));
}

TEST_F(abi_claim, paging_makes_it_void)
{
	const __u32 modes[] = { KDP_PAGING_ON, KDP_PAGING_ON_PRESENT, KDP_PAGING_OFF };

	for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
		ASSERT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_ON));
		EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 640, 1);
		EXPECT_CLAIM(2, self->fd, 640, 2, NULL);
		memset(self->s.alias + 640 * PAGE, 8, 2 * PAGE);
		ASSERT_EQ(0, kdp_paging(self->vm, 1, modes[i]));
		EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 640));
		EXPECT_EQ(KDP_CLAIM_VOID, fate(self->fd, KDP_COMMIT, KDP_COMMIT_ABANDON, 641));
		if (modes[i] == KDP_PAGING_ON)
			continue;
		/* What was zero is, whatever has been written there. */
		EXPECT_BYTE(0, self->s.guest + 640 * PAGE);
		EXPECT_BYTE(8, self->s.guest + 641 * PAGE);
	}
	EXPECT_CALL(ENXIO, 0, 0, self->fd, KDP_CLAIM, 0, 640, 1, NULL);
}

/* A claimant that has lost its memslot is told so. */
TEST_F(abi_claim, removed_memslot_makes_it_void)
{
	EXPECT_CLAIM(2, self->fd, 660, 2, NULL);
	ASSERT_EQ(0, kdp_remove(self->vm, 1));
	EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 660));
	EXPECT_CALL(ENOENT, 0, 0, self->fd, KDP_CLAIM, 0, 662, 1, NULL);
	EXPECT_EQ(-ENOENT, claimant(self->vm, 1));
}

/* Only its own guest is harmed by who sets the bit of a page that somebody has claimed. */
TEST_F(abi_claim, bit_set_by_hand_counts_for_more)
{
	EXPECT_CLAIM(2, self->fd, 680, 2, NULL);
	memset(self->s.alias + 680 * PAGE, 6, PAGE);
	bit_set(self->s.bitmap, 680);
	EXPECT_BYTE(6, self->s.guest + 680 * PAGE);
	EXPECT_EQ(KDP_CLAIM_PRESENT, FATE(KDP_COMMIT, 680));
	EXPECT_EQ(KDP_CLAIM_VOID, FATE(KDP_COMMIT, 680));
	EXPECT_EQ(KDP_CLAIM_PRESENT, FATE(KDP_CLAIM, 680));
}

TEST_F(abi_claim, wrong_range_is_einval)
{
	const struct kdp_range ranges[] = {
		{ 0, 0 }, { PAGES, 1 }, { PAGES - 1, 2 }, { 0, PAGES + 1 }, { ~0ULL, 1 },
		{ 1, ~0ULL }, { 0, 1ULL << 52 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(ranges); i++) {
		EXPECT_CALL(EINVAL, 0, 0, self->fd, KDP_CLAIM, 0, ranges[i].first, ranges[i].count, NULL);
		EXPECT_CALL(EINVAL, 0, 0, self->fd, KDP_COMMIT, 0, ranges[i].first, ranges[i].count, NULL);
	}
}

TEST_F(abi_claim, paging_off_is_enxio)
{
	EXPECT_EQ(0, kdp_paging(self->vm, 1, KDP_PAGING_OFF));
	EXPECT_CALL(ENXIO, 0, 0, self->fd, KDP_CLAIM, 0, 0, 1, NULL);
}

/* Pages go word by word; the first one has been claimed, and it cannot be told. */
TEST_F(abi_claim, bad_results_is_efault)
{
	EXPECT_CALL(EFAULT, 64, 64, self->fd, KDP_CLAIM, 0, 64, 128, (void *)-PAGE);
	EXPECT_EQ(KDP_CLAIM_TAKEN, FATE(KDP_CLAIM, 64));
	EXPECT_EQ(KDP_CLAIM_DONE, FATE(KDP_CLAIM, 128));
}

TEST_F(abi_claim, too_many_claimants_is_enospc)
{
	int fds[KDP_MAX_CLAIMANTS];

	for (int i = 0; i < KDP_MAX_CLAIMANTS - 1; i++) {
		fds[i] = claimant(self->vm, 1);
		ASSERT_LE(0, fds[i]);
	}
	EXPECT_EQ(-ENOSPC, claimant(self->vm, 1));
	close(fds[3]);
	fds[3] = claimant(self->vm, 1);
	EXPECT_LE(0, fds[3]);
}

TEST_F(abi_claim, no_descriptor_is_emfile)
{
	leave_fds(_metadata, 0);
	EXPECT_EQ(-EMFILE, claimant(self->vm, 1));
}

TEST_F(abi_claim, fd_takes_nothing_else)
{
	struct kdp_claim arg;
	char byte;

	EXPECT_EQ(ENOTTY, claim_call(self->vm, KDP_CLAIM, 0, 0, 1, NULL, &arg));
	EXPECT_EQ(ENOTTY, claim_call(self->vm, KDP_COMMIT, 0, 0, 1, NULL, &arg));
	EXPECT_EQ(ENOTTY, kdp_mark(self->fd, 1, KDP_STATE_PRESENT, 0, 1).err);
	EXPECT_EQ(-1, read(self->fd, &byte, 1));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, self->fd, 0));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(FD_CLOEXEC, fcntl(self->fd, F_GETFD));
}

/* What was claimed when the VM was closed can still be committed, and hurts nobody. */
TEST_F(abi_claim, claimant_outlives_its_vm)
{
	EXPECT_CLAIM(1, self->fd, 700, 1, NULL);
	close(self->vm);
	self->vm = -1;
	memset(self->s.alias + 700 * PAGE, 3, PAGE);
	EXPECT_COMMIT(1, self->fd, 700, 1, NULL);
	EXPECT_BYTE(3, self->s.guest + 700 * PAGE);
}
