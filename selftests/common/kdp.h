/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The ABI as C calls: each ioctl wrapper returns 0 or the errno, so that a
 * test can say what it expects in one line.
 */
#ifndef KDP_SELFTESTS_KDP_H
#define KDP_SELFTESTS_KDP_H

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <kselftest.h>
#include <linux/kvm_demand_paging.h>

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB	(21U << 26)
#define MFD_HUGE_1GB	(30U << 26)
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE	0x0010
#endif

#define PAGE	4096UL
#define HUGE	(512 * PAGE)

#define KDP_ARG(type, ...) \
	((struct type){ .size = sizeof(struct type), ##__VA_ARGS__ })

/* Where calls are counted, if somebody wants to know. */
extern atomic_ullong *kdp_ioctls;

/* 0 or the errno; -1 for a success that is not 0, which no ioctl has. */
static inline int kdp_ioctl(int fd, unsigned long cmd, void *arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (kdp_ioctls)
		atomic_fetch_add_explicit(kdp_ioctls, 1, memory_order_relaxed);
	if (ret < 0)
		return errno;
	return ret ? -1 : 0;
}

static inline int kdp_open(void)
{
	return open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC);
}

static inline int kdp_info(int vm, struct kdp_info *info)
{
	*info = KDP_ARG(kdp_info);
	return kdp_ioctl(vm, KDP_INFO, info);
}

static inline int kdp_create(int vm, struct kdp_memslot_create *arg)
{
	return kdp_ioctl(vm, KDP_MEMSLOT_CREATE, arg);
}

static inline int kdp_remove(int vm, __u32 id)
{
	struct kdp_memslot_remove arg = KDP_ARG(kdp_memslot_remove, .slot_id = id);

	return kdp_ioctl(vm, KDP_MEMSLOT_REMOVE, &arg);
}

static inline int kdp_get(int vm, __u32 id, __u32 flags, struct kdp_memslot_get *arg)
{
	*arg = KDP_ARG(kdp_memslot_get, .slot_id = id, .flags = flags);
	return kdp_ioctl(vm, KDP_MEMSLOT_GET, arg);
}

static inline int kdp_paging(int vm, __u32 id, __u32 mode)
{
	struct kdp_paging arg = KDP_ARG(kdp_paging, .slot_id = id, .mode = mode);

	return kdp_ioctl(vm, KDP_PAGING, &arg);
}

static inline int kdp_exits(int vm, __u32 mode)
{
	struct kdp_vcpu_exits arg = KDP_ARG(kdp_vcpu_exits, .mode = mode);

	return kdp_ioctl(vm, KDP_VCPU_EXITS, &arg);
}

/* The out fields go in as garbage here, too. */
static inline int kdp_collapse(int vm, __u32 id, __u64 first, __u64 count, struct kdp_collapse *arg)
{
	*arg = KDP_ARG(kdp_collapse, .slot_id = id, .first = first, .count = count,
		       .collapsed = 0x5a5a, .incomplete = 0x5a5a, .small = 0x5a5a, .missing = 0x5a5a);
	return kdp_ioctl(vm, KDP_COLLAPSE, arg);
}

/* The file of absent pages: all of them if there are no ranges. */
static inline int kdp_source(int vm, __u32 id, int fd, __u64 offset, const struct kdp_range *ranges,
			     __u32 nr)
{
	struct kdp_source arg = KDP_ARG(kdp_source, .slot_id = id, .fd = fd, .offset = offset,
					.ranges = (uintptr_t)ranges, .nr_ranges = nr);

	return kdp_ioctl(vm, KDP_SOURCE, &arg);
}

static inline int kdp_source_add(int vm, __u32 id, const struct kdp_range *ranges, __u32 nr)
{
	struct kdp_source arg = KDP_ARG(kdp_source, .flags = KDP_SOURCE_ADD, .slot_id = id, .fd = -1,
					.ranges = (uintptr_t)ranges, .nr_ranges = nr);

	return kdp_ioctl(vm, KDP_SOURCE, &arg);
}

struct marked {
	int err;
	__u32 done;
	__u64 changed;
};

/* The out fields go in as garbage: the module must write, not read them. */
static inline struct marked kdp_mark_ranges(int vm, __u32 id, __u32 state,
					    const struct kdp_range *ranges, __u32 nr)
{
	struct kdp_mark arg = KDP_ARG(kdp_mark, .slot_id = id, .state = state,
				      .ranges = (uintptr_t)ranges, .nr_ranges = nr,
				      .done = 0x5a5a5a5a, .changed = 0x5a5a5a5a5a5a5a5a);
	int err = kdp_ioctl(vm, KDP_MARK, &arg);

	return (struct marked){ err, arg.done, arg.changed };
}

static inline struct marked kdp_mark(int vm, __u32 id, __u32 state, __u64 first, __u64 count)
{
	struct kdp_range range = { first, count };

	return kdp_mark_ranges(vm, id, state, &range, 1);
}

static inline struct marked kdp_poison_ranges(int vm, __u32 id, __u32 flags, __u32 cause,
					      const struct kdp_range *ranges, __u32 nr)
{
	struct kdp_poison arg = KDP_ARG(kdp_poison, .flags = flags, .slot_id = id, .cause = cause,
					.ranges = (uintptr_t)ranges, .nr_ranges = nr,
					.done = 0x5a5a5a5a, .changed = 0x5a5a5a5a5a5a5a5a);
	int err = kdp_ioctl(vm, KDP_POISON, &arg);

	return (struct marked){ err, arg.done, arg.changed };
}

static inline struct marked kdp_poison(int vm, __u32 id, __u64 first, __u64 count)
{
	struct kdp_range range = { first, count };

	return kdp_poison_ranges(vm, id, 0, KDP_CAUSE_EMULATED, &range, 1);
}

static inline struct marked kdp_heal(int vm, __u32 id, __u64 first, __u64 count)
{
	struct kdp_range range = { first, count };

	return kdp_poison_ranges(vm, id, KDP_POISON_HEAL, 0, &range, 1);
}

/* A memfd of so many pages with these seals; -1 and errno when it cannot be. */
static inline int memfd_sealed(unsigned int mfd_flags, __u64 pages, unsigned int seals)
{
	int fd = memfd_create("kdp-selftest", MFD_CLOEXEC | MFD_ALLOW_SEALING | mfd_flags);

	if (fd < 0)
		return -1;
	if (ftruncate(fd, pages * PAGE) || (seals && fcntl(fd, F_ADD_SEALS, seals))) {
		close(fd);
		return -1;
	}
	return fd;
}

static inline int memfd_shmem(__u64 pages)
{
	return memfd_sealed(0, pages, F_SEAL_SHRINK);
}

static inline bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return ok;
}

static inline long read_number(const char *path)
{
	FILE *f = fopen(path, "re");
	long n = -1;

	if (f && fscanf(f, "%ld", &n) != 1)
		n = -1;
	if (f)
		fclose(f);
	return n;
}

#define HUGETLB_SYSFS	"/sys/kernel/mm/hugepages/hugepages-2048kB/"

/* Make sure that so many 2 MiB pages are free; false if they are not to be had. */
static inline bool hugetlb_reserve(long want)
{
	long have = read_number(HUGETLB_SYSFS "free_hugepages");
	char text[32];

	if (have < 0)
		return false;
	if (have < want) {
		snprintf(text, sizeof(text), "%ld",
			 read_number(HUGETLB_SYSFS "nr_hugepages") + want - have);
		write_text(HUGETLB_SYSFS "nr_hugepages", text);
	}
	return read_number(HUGETLB_SYSFS "free_hugepages") >= want;
}

/* The bitmap as the header defines it: bit n % 64 of word n / 64. */
static inline bool bit_get(atomic_ullong *bitmap, __u64 page)
{
	return atomic_load_explicit(&bitmap[page / 64], memory_order_acquire) >> (page % 64) & 1;
}

static inline void bit_set(atomic_ullong *bitmap, __u64 page)
{
	atomic_fetch_or_explicit(&bitmap[page / 64], 1ULL << (page % 64), memory_order_release);
}

static inline __u64 bitmap_bytes(__u64 pages)
{
	return ((pages + 7) / 8 + PAGE - 1) & ~(PAGE - 1);
}

#endif
