// SPDX-License-Identifier: GPL-2.0
/* KDP_MEMSLOT_GET and KDP_MEMSLOT_REMOVE. */
#include "test.h"

#define PAGES	32

FIXTURE(abi) {
	int vm;
	struct slot s;
};

FIXTURE_SETUP(abi)
{
	self->vm = vm_open(_metadata);
	self->s = slot_new(_metadata, self->vm, 5, PAGES, KDP_MEMSLOT_PAGING);
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

TEST_F(abi, get_describes)
{
	struct kdp_memslot_get get;

	memset(&get, 0xa5, sizeof(get));
	get.size = sizeof(get);
	get.flags = 0;
	get.slot_id = 5;
	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_MEMSLOT_GET, &get));
	EXPECT_EQ(sizeof(get), get.size);
	EXPECT_EQ(5, get.slot_id);
	EXPECT_EQ(KDP_PAGING_ON, get.paging);
	EXPECT_EQ(slot_base(5), get.base_gfn);
	EXPECT_EQ(PAGES, get.nr_pages);
	EXPECT_EQ(0, get.memfd_offset);
	EXPECT_EQ(PAGE, get.backing_page_size);
	EXPECT_EQ(-1, get.fd);
	EXPECT_EQ(-1, get.memfd);
	for (int i = 0; i < KDP_NAME_LEN; i++) {
		EXPECT_EQ(0, get.name[i]);
	}
}

TEST_F(abi, get_next_walks_in_order)
{
	const __u32 ids[] = { 0, 3, 5, 17, 0x7fffffff, 0xffffffff };
	struct kdp_memslot_get get;
	__u32 from = 0;
	size_t found = 0;

	/* Made out of order; their GFNs lie in another order still. */
	for (int i = ARRAY_SIZE(ids) - 1; i >= 0; i--) {
		struct kdp_memslot_create arg = good_create(_metadata, ids[i], PAGES);

		arg.base_gfn = (__u64)(100 - i) << 21;
		if (ids[i] != 5) {
			ASSERT_EQ(0, kdp_create(self->vm, &arg));
		}
	}
	while (!kdp_get(self->vm, from, KDP_GET_NEXT, &get)) {
		ASSERT_LT(found, ARRAY_SIZE(ids));
		EXPECT_EQ(ids[found], get.slot_id);
		EXPECT_EQ(PAGES, get.nr_pages);
		found++;
		if (get.slot_id == 0xffffffff)
			break;
		from = get.slot_id + 1;
	}
	EXPECT_EQ(ARRAY_SIZE(ids), found);
	EXPECT_EQ(0, kdp_get(self->vm, 5, KDP_GET_NEXT, &get));
	EXPECT_EQ(5, get.slot_id);
	ASSERT_EQ(0, kdp_remove(self->vm, 0xffffffff));
	ASSERT_EQ(0, kdp_remove(self->vm, 0x7fffffff));
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 18, KDP_GET_NEXT, &get));
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 4, 0, &get));
}

TEST_F(abi, get_next_on_an_empty_vm_is_enoent)
{
	struct kdp_memslot_get get;

	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 0, KDP_GET_NEXT, &get));
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 0xffffffff, KDP_GET_NEXT, &get));
}

TEST_F(abi, get_fd)
{
	struct kdp_memslot_get get;
	unsigned char *again;

	ASSERT_EQ(0, kdp_get(self->vm, 5, KDP_GET_FD, &get));
	ASSERT_LE(0, get.fd);
	EXPECT_EQ(-1, get.memfd);
	EXPECT_NE(self->s.fd, get.fd);
	EXPECT_EQ(FD_CLOEXEC, fcntl(get.fd, F_GETFD));
	EXPECT_EQ(PAGES * PAGE, lseek(get.fd, 0, SEEK_END));
	again = map_rw(_metadata, get.fd, PAGES * PAGE, 0);
	self->s.alias[PAGE] = 0x77;
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 1, 1);
	EXPECT_BYTE(0x77, again + PAGE);
	EXPECT_BYTE(0x77, self->s.guest + PAGE);
}

TEST_F(abi, get_fd_after_all_others_are_closed)
{
	struct kdp_memslot_get get;
	unsigned char *again;

	ASSERT_EQ(0, munmap(self->s.guest, PAGES * PAGE));
	ASSERT_EQ(0, munmap(self->s.bitmap, PAGE));
	close(self->s.fd);
	close(self->s.memfd);
	self->s.alias[0] = 0x42;
	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	ASSERT_EQ(0, kdp_get(self->vm, 5, KDP_GET_FD | KDP_GET_MEMFD, &get));
	again = map_rw(_metadata, get.fd, PAGES * PAGE, 0);
	EXPECT_BYTE(0x42, again);
	again = map_rw(_metadata, get.memfd, PAGES * PAGE, 0);
	EXPECT_BYTE(0x42, again);
}

TEST_F(abi, get_memfd)
{
	struct kdp_memslot_get get;
	struct stat a, b;
	unsigned char *alias;

	ASSERT_EQ(0, kdp_get(self->vm, 5, KDP_GET_MEMFD | KDP_GET_NEXT, &get));
	ASSERT_LE(0, get.memfd);
	EXPECT_EQ(-1, get.fd);
	EXPECT_NE(self->s.memfd, get.memfd);
	EXPECT_EQ(FD_CLOEXEC, fcntl(get.memfd, F_GETFD));
	EXPECT_EQ(F_SEAL_SHRINK, fcntl(get.memfd, F_GET_SEALS));
	ASSERT_EQ(0, fstat(self->s.memfd, &a));
	ASSERT_EQ(0, fstat(get.memfd, &b));
	EXPECT_EQ(a.st_ino, b.st_ino);
	EXPECT_EQ(a.st_dev, b.st_dev);
	alias = map_rw(_metadata, get.memfd, PAGES * PAGE, 0);
	alias[2 * PAGE] = 0x99;
	EXPECT_EQ(0x99, self->s.alias[2 * PAGE]);
}

TEST_F(abi, get_emfile)
{
	struct kdp_memslot_get get;

	leave_fds(_metadata, 0);
	EXPECT_EQ(0, kdp_get(self->vm, 5, 0, &get));
	EXPECT_EQ(EMFILE, kdp_get(self->vm, 5, KDP_GET_FD, &get));
	EXPECT_EQ(EMFILE, kdp_get(self->vm, 5, KDP_GET_MEMFD, &get));
	/* Room for one, and two are asked for: the one must be given back. */
	leave_fds(_metadata, 1);
	for (int i = 0; i < 3; i++) {
		EXPECT_EQ(EMFILE, kdp_get(self->vm, 5, KDP_GET_FD | KDP_GET_MEMFD, &get));
	}
	EXPECT_EQ(0, kdp_get(self->vm, 5, KDP_GET_FD, &get));
	leave_fds(_metadata, -1);
}

TEST_F(abi, remove_unmaps)
{
	struct toucher t = { 0 };
	unsigned char val;

	EXPECT_MARK(2, &self->s, KDP_STATE_PRESENT, 0, 2);
	EXPECT_MARK(1, &self->s, KDP_STATE_ZERO, 2, 1);
	EXPECT_BYTE(0, self->s.guest);
	ASSERT_EQ(0, touch_write(self->s.guest + PAGE, 0x31));
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	/* Mapped, present but never mapped, zero, absent: all are gone. */
	for (int page = 0; page < 4; page++) {
		EXPECT_EQ(SIGBUS, touch_read(self->s.guest + page * PAGE, &val));
		EXPECT_EQ(SIGBUS, touch_write(self->s.guest + page * PAGE, 1));
	}
	ASSERT_TRUE(toucher_start(&t, self->s.guest, TOUCH_KERNEL));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(EFAULT, t.result);
	EXPECT_FALSE(event_pending(self->vm, 0));
	/* The memory itself stays with its memfd. */
	EXPECT_EQ(0x31, self->s.alias[PAGE]);
}

TEST_F(abi, remove_wakes_waiters_with_sigbus)
{
	struct toucher user = { 0 }, kernel = { 0 };

	wait_begins(_metadata, &self->s, &user, 3, TOUCH_READ);
	wait_begins(_metadata, &self->s, &kernel, 4, TOUCH_KERNEL);
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	ASSERT_TRUE(toucher_join(&user));
	EXPECT_EQ(SIGBUS, user.result);
	ASSERT_TRUE(toucher_join(&kernel));
	EXPECT_EQ(EFAULT, kernel.result);
}

TEST_F(abi, remove_drops_unread_events)
{
	struct toucher t = { 0 };

	ASSERT_TRUE(toucher_start(&t, self->s.guest, TOUCH_READ));
	ASSERT_TRUE(event_pending(self->vm, PATIENCE_MS));
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_FALSE(event_pending(self->vm, 0));
}

TEST_F(abi, remove_twice_is_enoent)
{
	struct kdp_memslot_get get;

	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	EXPECT_EQ(ENOENT, kdp_remove(self->vm, 5));
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 5, 0, &get));
	EXPECT_EQ(ENOENT, kdp_mark(self->vm, 5, KDP_STATE_PRESENT, 0, 1).err);
	EXPECT_EQ(ENOENT, kdp_paging(self->vm, 5, KDP_PAGING_OFF));
}

TEST_F(abi, remove_frees_id_and_gfns)
{
	unsigned char *old = self->s.guest, val;
	struct slot again;

	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	again = slot_new(_metadata, self->vm, 5, PAGES, KDP_MEMSLOT_PAGING);
	/* A fresh memslot: nothing of the old one's states, nor of its mappings. */
	EXPECT_FALSE(bit_get(again.bitmap, 0));
	EXPECT_MARK(1, &again, KDP_STATE_PRESENT, 0, 1);
	EXPECT_BYTE(0, again.guest);
	EXPECT_EQ(SIGBUS, touch_read(old, &val));
}

TEST_F(abi, remove_makes_the_bitmap_sigbus)
{
	unsigned char val;

	EXPECT_MARK(1, &self->s, KDP_STATE_PRESENT, 0, 1);
	EXPECT_TRUE(bit_get(self->s.bitmap, 0));
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	EXPECT_EQ(SIGBUS, touch_read(self->s.bitmap, &val));
	EXPECT_EQ(SIGBUS, touch_or(self->s.bitmap, 1));
}

TEST_F(abi, remove_leaves_the_neighbours)
{
	struct slot n = slot_new(_metadata, self->vm, 6, PAGES, KDP_MEMSLOT_PAGING);

	n.alias[PAGE] = 0x61;
	EXPECT_MARK(2, &n, KDP_STATE_PRESENT, 0, 2);
	EXPECT_BYTE(0x61, n.guest + PAGE);
	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	EXPECT_BYTE(0x61, n.guest + PAGE);
	EXPECT_TRUE(bit_get(n.bitmap, 1));
}

TEST_F(abi, removed_memslot_maps_no_more)
{
	unsigned char val, *p;

	ASSERT_EQ(0, kdp_remove(self->vm, 5));
	p = map(self->s.fd, PAGE, PROT_READ, 0);
	if (p != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch_read(p, &val));
	}
	p = map(self->s.fd, PAGE, PROT_READ, KDP_BITMAP_OFFSET);
	if (p != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch_read(p, &val));
	}
}
