// SPDX-License-Identifier: GPL-2.0
/* Memslots with a name, and their nodes under /dev/kdp. */
#include "test.h"

#define PAGES	16

FIXTURE(abi_name) {
	int vm;
};

FIXTURE_SETUP(abi_name)
{
	self->vm = vm_open(_metadata);
	touch_init();
}

FIXTURE_TEARDOWN(abi_name)
{
	close(self->vm);
}

static const char *node(const char *name)
{
	static char path[128];

	snprintf(path, sizeof(path), "%s/%s", KDP_MEMSLOT_DIR, name);
	return path;
}

static bool exists(const char *name)
{
	struct stat st;

	return stat(node(name), &st) == 0;
}

static struct kdp_memslot_create named(struct __test_metadata *_metadata, __u32 id,
				       const char *name)
{
	struct kdp_memslot_create arg = good_create(_metadata, id, PAGES);

	memcpy(arg.name, name, strlen(name));
	return arg;
}

TEST_F(abi_name, node_appears_and_goes)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st.appears");
	struct kdp_memslot_get get;
	struct stat st;

	EXPECT_FALSE(exists("st.appears"));
	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	ASSERT_EQ(0, stat(node("st.appears"), &st));
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(0600, st.st_mode & 07777);
	EXPECT_EQ(0, st.st_uid);
	ASSERT_EQ(0, kdp_get(self->vm, 1, 0, &get));
	EXPECT_STREQ("st.appears", (char *)get.name);
	ASSERT_EQ(0, kdp_remove(self->vm, 1));
	EXPECT_FALSE(exists("st.appears"));
}

TEST_F(abi_name, node_goes_with_the_vm)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st-vm-closed");

	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	EXPECT_TRUE(exists("st-vm-closed"));
	close(self->vm);
	EXPECT_FALSE(exists("st-vm-closed"));
	/* The memslot's own fd is still open, and the name is free all the same. */
	self->vm = vm_open(_metadata);
	arg = named(_metadata, 1, "st-vm-closed");
	EXPECT_EQ(0, kdp_create(self->vm, &arg));
}

TEST_F(abi_name, node_opens_as_the_memslot)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st_opens");
	unsigned char *alias, *by_fd, *by_node;
	atomic_ullong *bitmap;
	int fd;

	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	fd = open(node("st_opens"), O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, fd);
	EXPECT_EQ(PAGES * PAGE, lseek(fd, 0, SEEK_END));
	alias = map_rw(_metadata, arg.memfd, PAGES * PAGE, 0);
	by_fd = map_rw(_metadata, arg.fd, PAGES * PAGE, 0);
	by_node = map_rw(_metadata, fd, PAGES * PAGE, 0);
	bitmap = map_rw(_metadata, fd, PAGE, KDP_BITMAP_OFFSET);
	alias[3 * PAGE] = 0x33;
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, 3, 1).changed);
	EXPECT_TRUE(bit_get(bitmap, 3));
	EXPECT_BYTE(0x33, by_node + 3 * PAGE);
	EXPECT_EQ(0, touch_write(by_node + 3 * PAGE, 0x34));
	EXPECT_BYTE(0x34, by_fd + 3 * PAGE);
	/* Absent is absent for both. */
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_ABSENT, 3, 1).changed);
	struct slot s = { .vm = self->vm, .id = 1, .pages = PAGES, .guest = by_node };
	struct toucher t = { 0 };

	wait_begins(_metadata, &s, &t, 3, TOUCH_READ);
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, 3, 1).changed);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_EQ(0x34, t.val);
	EXPECT_EQ(ENOTTY, kdp_ioctl(fd, KDP_INFO, &(struct kdp_info){ .size = sizeof(struct kdp_info) }));
}

TEST_F(abi_name, node_opened_read_only)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st-ro");
	int fd;

	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	fd = open(node("st-ro"), O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	EXPECT_EQ(MAP_FAILED, map(fd, PAGE, PROT_READ | PROT_WRITE, 0));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(MAP_FAILED, map(fd, PAGE, PROT_READ | PROT_WRITE, KDP_BITMAP_OFFSET));
	EXPECT_EQ(EACCES, errno);
	void *ro = map(fd, PAGE, PROT_READ, 0);

	ASSERT_NE(MAP_FAILED, ro);
	EXPECT_EQ(-1, mprotect(ro, PAGE, PROT_READ | PROT_WRITE));
	ro = map(fd, PAGE, PROT_READ, KDP_BITMAP_OFFSET);
	ASSERT_NE(MAP_FAILED, ro);
	EXPECT_EQ(-1, mprotect(ro, PAGE, PROT_READ | PROT_WRITE));
}

TEST_F(abi_name, node_fd_after_remove_gets_sigbus)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st-removed");
	unsigned char *p, val;
	int fd;

	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	EXPECT_EQ(1, kdp_mark(self->vm, 1, KDP_STATE_PRESENT, 0, 1).changed);
	fd = open(node("st-removed"), O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, fd);
	p = map_rw(_metadata, fd, PAGE, 0);
	EXPECT_EQ(0, touch_read(p, &val));
	ASSERT_EQ(0, kdp_remove(self->vm, 1));
	EXPECT_EQ(SIGBUS, touch_read(p, &val));
	EXPECT_EQ(-1, open(node("st-removed"), O_RDWR | O_CLOEXEC));
	EXPECT_EQ(ENOENT, errno);
}

TEST_F(abi_name, good_names)
{
	static const char * const good[] = {
		"a", "0", "_", "-", "-.", "Z9", "a..b",
		"abcdefghijklmnopqrstuvwxyz01234",	/* 31 */
		"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
		"01234567890._-",
	};

	for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
		struct kdp_memslot_create arg = named(_metadata, i, good[i]);

		EXPECT_EQ(0, kdp_create(self->vm, &arg)) TH_LOG("'%s'", good[i]);
		EXPECT_TRUE(exists(good[i])) TH_LOG("'%s'", good[i]);
	}
}

TEST_F(abi_name, bad_names_are_einval)
{
	const struct { const char *name; size_t len; } bad[] = {
		{ ".", 1 }, { "..", 2 }, { ".hidden", 7 }, { "a/b", 3 }, { "/", 1 }, { "../x", 4 },
		{ "a b", 3 }, { "a!b", 3 }, { "a%b", 3 }, { "a\n", 2 }, { "\x7f", 1 },
		{ "a\xc3\xa4", 3 }, { "a:b", 3 }, { "a@b", 3 }, { "a[b", 3 }, { "a`b", 3 },
		{ "a{b", 3 }, { "a,b", 3 }, { "*", 1 },
		/* not zero-padded */
		{ "a\0b", 3 }, { "\0b", 2 }, { "a\0\0\0/", 5 },
		/* no NUL */
		{ "abcdefghijklmnopqrstuvwxyz012345", 32 },
	};
	struct kdp_memslot_get get;

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct kdp_memslot_create arg = good_create(_metadata, i, PAGES);

		memcpy(arg.name, bad[i].name, bad[i].len);
		EXPECT_EQ(EINVAL, kdp_create(self->vm, &arg)) TH_LOG("case %zu", i);
		close(arg.memfd);
	}
	/* A NUL at the very end of the field only is good; a byte after it is not. */
	for (size_t at = 2; at < KDP_NAME_LEN; at++) {
		struct kdp_memslot_create arg = named(_metadata, 1, "x");

		arg.name[at] = 'y';
		EXPECT_EQ(EINVAL, kdp_create(self->vm, &arg)) TH_LOG("byte %zu not zero", at);
		close(arg.memfd);
	}
	EXPECT_EQ(ENOENT, kdp_get(self->vm, 0, KDP_GET_NEXT, &get));
}

TEST_F(abi_name, eexist)
{
	struct kdp_memslot_create a = named(_metadata, 1, "st-taken");
	struct kdp_memslot_create b = named(_metadata, 2, "st-taken");
	struct kdp_memslot_get get;
	int other = vm_open(_metadata);

	ASSERT_EQ(0, kdp_create(self->vm, &a));
	EXPECT_EQ(EEXIST, kdp_create(self->vm, &b));
	/* In another VM, too. */
	EXPECT_EQ(EEXIST, kdp_create(other, &b));
	EXPECT_EQ(ENOENT, kdp_get(other, 0, KDP_GET_NEXT, &get));
	/* Case matters, prefixes do not. */
	b = named(_metadata, 3, "st-Taken");
	EXPECT_EQ(0, kdp_create(self->vm, &b));
	b = named(_metadata, 4, "st-take");
	EXPECT_EQ(0, kdp_create(self->vm, &b));
	ASSERT_EQ(0, kdp_remove(self->vm, 1));
	b = named(_metadata, 2, "st-taken");
	EXPECT_EQ(0, kdp_create(other, &b));
	close(other);
}

TEST_F(abi_name, refused_create_leaves_no_node)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st-refused");

	arg.nr_pages = PAGES + 1;
	EXPECT_EQ(EINVAL, kdp_create(self->vm, &arg));
	EXPECT_FALSE(exists("st-refused"));
	arg.nr_pages = PAGES;
	leave_fds(_metadata, 0);
	EXPECT_EQ(EMFILE, kdp_create(self->vm, &arg));
	leave_fds(_metadata, -1);
	EXPECT_FALSE(exists("st-refused"));
	EXPECT_EQ(0, kdp_create(self->vm, &arg));
	EXPECT_TRUE(exists("st-refused"));
}

TEST_F(abi_name, chown_lets_others_open)
{
	struct kdp_memslot_create arg = named(_metadata, 1, "st-chown");
	pid_t child;

	ASSERT_EQ(0, kdp_create(self->vm, &arg));
	for (int owned = 0; owned < 2; owned++) {
		if (owned) {
			ASSERT_EQ(0, chown(node("st-chown"), 65534, 65534));
		}
		child = fork();
		if (!child) {
			if (setgid(65534) || setuid(65534))
				_exit(2);
			_exit(open(node("st-chown"), O_RDWR) < 0);
		}
		EXPECT_EQ(!owned, child_status(child));
	}
}

TEST_F(abi_name, many_nodes)
{
	char name[KDP_NAME_LEN];

	for (__u32 id = 0; id < 300; id++) {
		struct kdp_memslot_create arg;

		snprintf(name, sizeof(name), "st-many-%u", id);
		arg = named(_metadata, id, name);
		ASSERT_EQ(0, kdp_create(self->vm, &arg)) TH_LOG("%s", name);
		close(arg.fd);
		close(arg.memfd);
	}
	EXPECT_TRUE(exists("st-many-0"));
	EXPECT_TRUE(exists("st-many-299"));
	close(self->vm);
	EXPECT_FALSE(exists("st-many-0"));
	EXPECT_FALSE(exists("st-many-299"));
	self->vm = vm_open(_metadata);
}
