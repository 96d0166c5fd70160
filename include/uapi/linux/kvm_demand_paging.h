/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Demand paging for KVM guests, 4 KiB at a time on any backing.
 *
 * This header is the one definition of the ABI; the module's and the userspace
 * crate's bindings are both generated from it.
 *
 * Opening /dev/kvm-demand-paging makes a *VM*. Its file descriptor takes the
 * ioctls below and is the notification fd: read(2) returns struct kdp_event,
 * poll(2) says when there is one. A *memslot* of the VM has a file descriptor
 * of its own, which is mapped to get guest memory and the present bitmap.
 *
 * A page is 4096 bytes everywhere in this ABI, whatever the backing. A page is
 * named by its index in its memslot: page 0 is the memslot's first.
 */
#ifndef _UAPI_LINUX_KVM_DEMAND_PAGING_H
#define _UAPI_LINUX_KVM_DEMAND_PAGING_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Changes only when an old program would misread a new kernel module. */
#define KDP_API_VERSION	1

#define KDP_DEVICE_PATH	"/dev/kvm-demand-paging"

/* Where memslots created with a name appear. */
#define KDP_MEMSLOT_DIR	"/dev/kdp"

#define KDP_PAGE_SHIFT	12

/* Limits, also reported by KDP_INFO. */
#define KDP_MAX_MEMSLOTS	4096	/* memslots of one VM */
#define KDP_MAX_VCPU_THREADS	4096	/* threads of one VM with exits on */
#define KDP_MAX_RANGES		16384	/* ranges of one KDP_MARK */
#define KDP_MAX_PAGES		(1ULL << 36)	/* pages of one memslot: 256 TiB */
#define KDP_MAX_CLAIMANTS	64	/* claimants of one memslot */

/* The size of a name with its NUL. */
#define KDP_NAME_LEN	32

/*
 * mmap(2) offset, on a memslot's fd, of the present bitmap: one bit per page,
 * 1 is present, in 64-bit little-endian words; page n is bit n % 64 of word
 * n / 64. Its length is nr_pages / 8 bytes rounded up to a page. Guest memory
 * is at offset 0.
 *
 * Set a bit with an atomic OR of release ordering, after the page's bytes are
 * written through a mapping of the memfd. Never clear one by hand: only
 * KDP_MARK unmaps the page from those who have it. A page that somebody
 * *waits* for (an event was read) must be resolved by KDP_MARK, which wakes.
 */
#define KDP_BITMAP_OFFSET	(1ULL << 60)

#define KDP_IOC_TYPE	0xdb

/**
 * DOC: ioctls
 *
 * Every argument begins with its size in bytes, as the caller knows it. A
 * caller with a newer, longer struct than the module's is accepted as long as
 * what the module does not know is zero.
 *
 * These errors are common to all ioctls:
 *
 *  - EINVAL: the size is below the first published one.
 *  - E2BIG: the struct is longer than 4096 bytes, or longer than the module's
 *    and not zero there.
 *  - EOPNOTSUPP: a flag or a mode that the module does not know, or a reserved
 *    field that is not zero.
 *  - EFAULT: the argument, or memory that it points at, cannot be accessed.
 *  - ENOMEM: out of memory.
 *  - ENOTTY: an ioctl that the module does not know, or one that is not for
 *    this file descriptor. Memslot fds take none; a claimant's fd takes
 *    KDP_CLAIM and KDP_COMMIT, a VM's all others.
 *  - ENOENT: the VM has no memslot of this slot_id.
 */

/**
 * struct kdp_info - ioctl(KDP_INFO)
 * @size: sizeof(struct kdp_info)
 * @flags: must be 0
 * @api_version: out: KDP_API_VERSION of the module
 * @page_shift: out: log2 of the page size, 12
 * @features: out: KDP_FEATURE_*
 * @bitmap_offset: out: KDP_BITMAP_OFFSET
 * @max_pages: out: pages that one memslot may have
 * @max_memslots: out: memslots that one VM may have
 * @max_vcpu_threads: out: threads that one VM may have exits on for
 * @max_ranges: out: ranges that one KDP_MARK may name
 * @event_size: out: sizeof(struct kdp_event) that read(2) returns
 *
 * What this module can do.
 */
struct kdp_info {
	__u32 size;
	__u32 flags;
	__u32 api_version;
	__u32 page_shift;
	__u64 features;
	__u64 bitmap_offset;
	__u64 max_pages;
	__u32 max_memslots;
	__u32 max_vcpu_threads;
	__u32 max_ranges;
	__u32 event_size;
};
#define KDP_INFO	_IO(KDP_IOC_TYPE, 0x80)

/* KVM is loaded and its tracepoints are there: KDP_VCPU_EXITS works. */
#define KDP_FEATURE_EXITS	(1ULL << 0)
/* Memslots may have a name, and so a path under KDP_MEMSLOT_DIR. */
#define KDP_FEATURE_PATHS	(1ULL << 1)
/* Whole blocks are mapped by huge page table entries. */
#define KDP_FEATURE_HUGE	(1ULL << 2)
/* KDP_STATE_ZERO. */
#define KDP_FEATURE_ZERO	(1ULL << 3)
/* KDP_COLLAPSE. */
#define KDP_FEATURE_COLLAPSE	(1ULL << 4)
/* KDP_SOURCE. */
#define KDP_FEATURE_SOURCE	(1ULL << 5)
/* KDP_POISON. */
#define KDP_FEATURE_POISON	(1ULL << 6)
/* The kernel's memory errors poison pages (CONFIG_MEMORY_FAILURE). */
#define KDP_FEATURE_MEMORY_FAILURE	(1ULL << 7)
/* KDP_PLACE. */
#define KDP_FEATURE_PLACE	(1ULL << 9)
/* KDP_REPLACE. */
#define KDP_FEATURE_REPLACE	(1ULL << 8)
/* KDP_CLAIMANT, KDP_CLAIM, KDP_COMMIT. */
#define KDP_FEATURE_CLAIM	(1ULL << 10)
/* KDP_MEMFD: the kernel has transparent huge pages. */
#define KDP_FEATURE_MEMFD	(1ULL << 11)

/**
 * struct kdp_memslot_create - ioctl(KDP_MEMSLOT_CREATE)
 * @size: sizeof(struct kdp_memslot_create)
 * @flags: KDP_MEMSLOT_* flags
 * @slot_id: the caller's name for the memslot, unique in the VM
 * @memfd: a memfd (memfd_create(2)) of shmem or hugetlb pages, open for
 *         writing, sealed with F_SEAL_SHRINK
 * @base_gfn: the guest frame number of page 0
 * @nr_pages: length in pages
 * @memfd_offset: where in the memfd page 0 is, in bytes
 * @fd: out: the memslot's fd, opened with O_CLOEXEC
 * @__reserved: must be 0
 * @name: NUL-terminated and zero-padded; empty, or 1 to 31 of [A-Za-z0-9._-]
 *        that do not begin with a dot. A named memslot can also be opened as
 *        /dev/kdp/NAME, until it is removed or its VM is closed. The node is
 *        created for root alone (mode 0600); chown(2) it for others.
 *
 * Create a memslot. Its cost does not depend on its size: neither memory nor
 * bitmap is allocated before it is touched.
 *
 * A memslot on shmem is ordinary memory: its pages are not pinned, and not charged to
 * RLIMIT_MEMLOCK. Who touches a page pays for it (memory cgroups). The kernel swaps
 * and moves pages as those of the memfd. get_user_pages() works, and with it O_DIRECT,
 * io_uring, process_vm_readv(2) and nested guests; it waits for absent pages. Through
 * /proc/PID/mem an absent page is EIO. A mapping may be MAP_PRIVATE: what was written
 * there stays when the page is made absent. A block is mapped by one entry if the memfd
 * holds a folio of 2 MiB there, @memfd_offset is a multiple of 2 MiB, and all its pages
 * are present.
 *
 * The huge pages of hugetlb are pinned one by one as they are mapped, and mapped past
 * the kernel's own bookkeeping (VM_PFNMAP): get_user_pages() fails with EFAULT, and so
 * does MAP_PRIVATE with EINVAL.
 *
 * Errors beside the common ones:
 *
 *  - EBADF: memfd is not an open fd.
 *  - EACCES: memfd is not open for writing.
 *  - EINVAL: memfd is not a memfd of shmem or hugetlb; nr_pages is 0 or above
 *    the limit; memfd_offset or, on hugetlb, nr_pages is not a multiple of the
 *    backing's page size; the range runs past the memfd's end; base_gfn +
 *    nr_pages overflows a 52-bit guest physical address; the name is malformed.
 *  - EPERM: memfd lacks F_SEAL_SHRINK, or has F_SEAL_WRITE or
 *    F_SEAL_FUTURE_WRITE.
 *  - EEXIST: slot_id, a part of the GFN range or the name is taken.
 *  - ENOSPC: the VM has max_memslots memslots.
 *  - EBUSY: a huge page of the memfd is just being replaced (KDP_REPLACE).
 *  - EMFILE: no file descriptor is left. ENFILE: the system has no open file left.
 */
struct kdp_memslot_create {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__s32 memfd;
	__u64 base_gfn;
	__u64 nr_pages;
	__u64 memfd_offset;
	__s32 fd;
	__u32 __reserved;
	__u8 name[KDP_NAME_LEN];
};
#define KDP_MEMSLOT_CREATE	_IO(KDP_IOC_TYPE, 0x81)

/* Create the memslot with demand paging on and every page absent. */
#define KDP_MEMSLOT_PAGING	(1U << 0)
/*
 * A vCPU that touches a poisoned page gets what it gets elsewhere, for VMMs that
 * do not know us: KVM sends its thread SIGBUS with si_code BUS_MCEERR_AR, si_addr
 * in the page and si_addr_lsb 12, and KVM_RUN ends with EINTR as for any signal;
 * also in threads with exits on. On hugetlb it takes two more areas (vm.max_map_count) in each
 * process that maps the memslot, for each range that is poisoned; where a VMM has
 * more than 32768, KVM_RUN fails with EFAULT instead, as it may where a page is healed
 * and poisoned again while a vCPU is in the middle of a fault on it. Without this flag
 * a thread with exits on gets an exit with KDP_EXIT_POISONED. Others get the signal on
 * shmem, and on hugetlb KVM_RUN fails with EFAULT.
 */
#define KDP_MEMSLOT_POISON_SIGNAL	(1U << 1)

/**
 * struct kdp_memslot_remove - ioctl(KDP_MEMSLOT_REMOVE)
 * @size: sizeof(struct kdp_memslot_remove)
 * @flags: must be 0
 * @slot_id: the memslot
 * @__reserved: must be 0
 *
 * Remove a memslot. It is unmapped from every process before the call returns;
 * who waits for one of its pages, and whoever touches it from now on, gets
 * SIGBUS (or EFAULT, in the kernel), through fds that are still open, too. Huge
 * pages are unpinned.
 */
struct kdp_memslot_remove {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 __reserved;
};
#define KDP_MEMSLOT_REMOVE	_IO(KDP_IOC_TYPE, 0x82)

/**
 * struct kdp_memslot_get - ioctl(KDP_MEMSLOT_GET)
 * @size: sizeof(struct kdp_memslot_get)
 * @flags: KDP_GET_* flags
 * @slot_id: in: the memslot, or with KDP_GET_NEXT the lowest slot_id to
 *           consider; out: the memslot that was found
 * @paging: out: KDP_PAGING_OFF or KDP_PAGING_ON
 * @base_gfn: out: the guest frame number of page 0
 * @nr_pages: out: length in pages
 * @memfd_offset: out: where in the memfd page 0 is, in bytes
 * @backing_page_size: out: 4096 for shmem, the huge page size for hugetlb
 * @fd: out: a new fd of the memslot with KDP_GET_FD, else -1
 * @memfd: out: a new fd of its memfd with KDP_GET_MEMFD, else -1
 * @name: out: the name, empty if it has none
 *
 * Describe a memslot, and get at its files. A handler that was handed the VM's
 * fd alone, say after its predecessor died, finds all it needs by this call.
 *
 * Errors beside the common ones:
 *
 *  - ENOENT: no such memslot; with KDP_GET_NEXT, none from slot_id upwards.
 *  - EMFILE: no file descriptor is left.
 */
struct kdp_memslot_get {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 paging;
	__u64 base_gfn;
	__u64 nr_pages;
	__u64 memfd_offset;
	__u64 backing_page_size;
	__s32 fd;
	__s32 memfd;
	__u8 name[KDP_NAME_LEN];
};
#define KDP_MEMSLOT_GET	_IO(KDP_IOC_TYPE, 0x83)

#define KDP_GET_NEXT	(1U << 0)
#define KDP_GET_FD	(1U << 1)
#define KDP_GET_MEMFD	(1U << 2)

/**
 * struct kdp_paging - ioctl(KDP_PAGING)
 * @size: sizeof(struct kdp_paging)
 * @flags: must be 0
 * @slot_id: the memslot
 * @mode: KDP_PAGING_OFF, KDP_PAGING_ON or KDP_PAGING_ON_PRESENT
 *
 * Switch demand paging of a memslot, while its guest runs.
 *
 * OFF: every page becomes present, whatever its state was; all waiters go on;
 * the bitmap's memory is given back, and touching a mapping of it gives SIGBUS.
 *
 * Whatever the mode, a block of which every page is present is mapped by one
 * entry as large as its backing allows. Where a process has touched single
 * pages of it before, that happens by itself after its next fault there: the
 * process's mapping of the memslot is then mapped anew, in the thread that
 * faulted. /proc/PID/maps may show the mapping in several parts meanwhile.
 *
 * ON: every page becomes absent, unmapped from every process before the call
 * returns. ON_PRESENT: every page becomes present, and can be made absent.
 * Both start with a fresh bitmap, also when paging is on already.
 *
 * With OFF and ON_PRESENT, pages in the state zero are filled with zeros first.
 * Claims (KDP_CLAIM) are void.
 *
 * Errors beside the common ones:
 *
 *  - ENOMEM: a page in the state zero cannot be filled; nothing but pages in
 *    the state zero has changed.
 *  - EINTR: a fatal signal arrived meanwhile; likewise.
 */
struct kdp_paging {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 mode;
};
#define KDP_PAGING	_IO(KDP_IOC_TYPE, 0x84)

#define KDP_PAGING_OFF		0
#define KDP_PAGING_ON		1
#define KDP_PAGING_ON_PRESENT	2

/**
 * struct kdp_range - pages of a memslot
 * @first: the index of the first page
 * @count: how many, not 0
 */
struct kdp_range {
	__u64 first;
	__u64 count;
};

/**
 * struct kdp_mark - ioctl(KDP_MARK)
 * @size: sizeof(struct kdp_mark)
 * @flags: must be 0
 * @slot_id: the memslot
 * @state: KDP_STATE_PRESENT, KDP_STATE_ABSENT or KDP_STATE_ZERO
 * @ranges: address of an array of struct kdp_range
 * @nr_ranges: its length, 1 to max_ranges
 * @done: out: ranges that were done wholly
 * @changed: out: pages whose state this call changed
 *
 * Change the state of pages. All ranges are checked before anything changes.
 * They may overlap; they are done in their order.
 *
 * A page that is claimed (KDP_CLAIM) is left alone by PRESENT and ZERO, and is not
 * counted; who waits for it goes on waiting. ABSENT makes the claim void.
 *
 * PRESENT: the pages' bytes are in the memfd. Everything written to them
 * before the call is seen by whoever touches them after it. Who waits for them
 * goes on. A page that is present already stays as it is and is not counted in
 * @changed, but who waits for it is woken: this is also how to wake waiters
 * of a page whose bit was set by hand.
 *
 * ABSENT: the pages' bytes are elsewhere. They are unmapped from every process
 * before the call returns, from KVM's guests too. Huge pages of hugetlb that
 * hold nothing but absent pages are unpinned. The memory can now be given back
 * by fallocate(2) with FALLOC_FL_PUNCH_HOLE on the memfd.
 *
 * ZERO: absent pages that are known to hold nothing. When touched, they are
 * zero-filled in the kernel and become present, with neither exit nor event.
 * A page that is present stays as it is and is not counted. Who waits for a
 * page goes on, as with PRESENT: to zeros, or to what a present page holds.
 *
 * @done and @changed are written also when the call fails half-way.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: nr_ranges is 0 or above max_ranges; a range is empty, overflows
 *    or runs past the memslot's end.
 *  - ENXIO: ABSENT or ZERO on a memslot with demand paging off. (PRESENT
 *    succeeds there and changes nothing.)
 *  - EINTR: a fatal signal arrived; @done ranges are done.
 */
struct kdp_mark {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 state;
	__aligned_u64 ranges;
	__u32 nr_ranges;
	__u32 done;
	__u64 changed;
};
#define KDP_MARK	_IO(KDP_IOC_TYPE, 0x85)

#define KDP_STATE_ABSENT	0
#define KDP_STATE_PRESENT	1
#define KDP_STATE_ZERO		2

/**
 * struct kdp_vcpu_exits - ioctl(KDP_VCPU_EXITS)
 * @size: sizeof(struct kdp_vcpu_exits)
 * @flags: must be 0
 * @mode: KDP_EXITS_OFF or KDP_EXITS_ON
 * @__reserved: must be 0
 *
 * Ask for fault exits, for the calling thread: when a vCPU that it runs takes
 * a stage-2 fault on a page of this VM that cannot be mapped, KVM_RUN returns
 * -1 with errno EFAULT, exit_reason KVM_EXIT_MEMORY_FAULT and, in
 * kvm_run.memory_fault, the page's GPA, its size (4096) and KDP_EXIT_* flags.
 * The thread fetches the page, marks it present and enters KVM_RUN again.
 *
 * A guest page is known by its GPA: base_gfn must be where KVM has it. All
 * other accesses of the thread (KVM's own, its own, system calls) wait.
 *
 * A thread has exits on for one VM at a time; they are off again when the VM is
 * closed. Exits are off for the guest of a guest: its faults wait.
 *
 * Errors beside the common ones:
 *
 *  - EOPNOTSUPP: KVM is not loaded, or lacks the tracepoints.
 *  - EBUSY: the thread has exits on for another VM.
 *  - ENOSPC: the VM has max_vcpu_threads of them.
 */
struct kdp_vcpu_exits {
	__u32 size;
	__u32 flags;
	__u32 mode;
	__u32 __reserved;
};
#define KDP_VCPU_EXITS	_IO(KDP_IOC_TYPE, 0x86)

#define KDP_EXITS_OFF	0
#define KDP_EXITS_ON	1

/**
 * struct kdp_collapse - ioctl(KDP_COLLAPSE)
 * @size: sizeof(struct kdp_collapse)
 * @flags: must be 0
 * @slot_id: the memslot
 * @__reserved: must be 0
 * @first: the first page
 * @count: how many pages
 * @collapsed: out: pages of blocks that are whole
 * @incomplete: out: pages of blocks that lack a page
 * @small: out: pages that no huge entry can map: their memory is no huge page,
 *         on shmem no folio of 2 MiB that is aligned like the block, or the
 *         range holds a part of their block only
 * @missing: out: the first page of the range, in a block that is counted in
 *           @incomplete, that is absent, zero or poisoned; all ones if there is
 *           none
 *
 * Have blocks mapped by one entry that are mapped by single pages. A block is
 * what one page table entry can map, 2 MiB, on a memfd of huge pages, or of
 * shmem where it holds a folio of that size; a page of 1 GiB is 512 blocks. It
 * is whole when all its pages are present. Whole blocks are unmapped from every
 * process, and each process maps them by one entry at its next touches.
 *
 * That happens by itself to a block that is touched, or made whole by KDP_MARK,
 * so this is for blocks that became whole by bits set by hand and of which only
 * pages are touched that were mapped before. Blocks that are huge already cost a
 * fault each.
 *
 * @collapsed + @incomplete + @small = @count; they are written also when the
 * call fails half-way.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: the range is empty, overflows or runs past the memslot's end.
 *  - EINTR: a fatal signal arrived; what is counted is done.
 */
struct kdp_collapse {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 __reserved;
	__u64 first;
	__u64 count;
	__u64 collapsed;
	__u64 incomplete;
	__u64 small;
	__u64 missing;
};
#define KDP_COLLAPSE	_IO(KDP_IOC_TYPE, 0x87)

/**
 * struct kdp_source - ioctl(KDP_SOURCE)
 * @size: sizeof(struct kdp_source)
 * @flags: KDP_SOURCE_* flags
 * @slot_id: the memslot
 * @fd: a file on a filesystem or a block device, open for reading; -1 with
 *      KDP_SOURCE_ADD, and to have no source any more
 * @offset: where in the file page 0 of the memslot is, in bytes, a multiple of
 *          4096; 0 without a file
 * @ranges: address of an array of struct kdp_range: the pages that the file
 *          has; 0 if it has all
 * @nr_ranges: its length, up to max_ranges; 0 for all pages
 * @__reserved: must be 0
 *
 * Name a file that has the bytes of absent pages. Who touches such a page, be it
 * a vCPU with exits on, has it read in the fault: there is neither an exit nor
 * an event, and no handler is needed. Who goes through its memory in order has
 * the pages ahead read in the background, up to whole blocks.
 *
 * A page has a source from this call on until it leaves the state absent; one
 * that KDP_MARK makes absent afterwards has none, for its bytes are elsewhere.
 * KDP_PAGING takes the source away. A second call replaces the first one.
 *
 * The file must not change as long as it is the source. It is read through the
 * page cache, where it has one. Pages that have a source are its to fill: make
 * one absent by KDP_MARK before it is filled in another way, and do not set its
 * bit by hand before that.
 *
 * If a page cannot be read, or the file ends before the page does, the toucher
 * gets SIGBUS (a vCPU with exits on: an exit with KDP_EXIT_SOURCE_ERROR) and
 * there is an event of type KDP_EVENT_SOURCE_ERROR. The page stays absent, and
 * is read anew at the next touch.
 *
 * Errors beside the common ones:
 *
 *  - EBADF: fd is neither an open fd nor -1.
 *  - EACCES: the file is not open for reading.
 *  - EINVAL: the file is neither a regular file nor a block device, or cannot be
 *    read at an offset; offset is not a multiple of 4096, runs past the largest
 *    file there can be, or is not 0 without a file; ranges without a file, but
 *    for KDP_SOURCE_ADD; KDP_SOURCE_ADD without ranges or with a file; nr_ranges
 *    is above max_ranges; a range is empty, overflows or runs past the memslot's
 *    end.
 *  - ENXIO: the memslot has demand paging off; KDP_SOURCE_ADD: it has no source.
 *  - ENOMEM: with KDP_SOURCE_ADD, some of the ranges may have been added.
 *  - EINTR: a fatal signal arrived; likewise.
 */
struct kdp_source {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__s32 fd;
	__u64 offset;
	__aligned_u64 ranges;
	__u32 nr_ranges;
	__u32 __reserved;
};
#define KDP_SOURCE	_IO(KDP_IOC_TYPE, 0x88)

/* Keep the source, and add ranges to what its file has. */
#define KDP_SOURCE_ADD	(1U << 0)

/**
 * struct kdp_poison - ioctl(KDP_POISON)
 * @size: sizeof(struct kdp_poison)
 * @flags: KDP_POISON_* flags
 * @slot_id: the memslot
 * @cause: KDP_CAUSE_EMULATED or KDP_CAUSE_INHERITED; with KDP_POISON_HEAL 0
 * @ranges: address of an array of struct kdp_range
 * @nr_ranges: its length, 1 to max_ranges
 * @done: out: ranges that were done wholly
 * @changed: out: pages that this call has poisoned, or healed
 *
 * Say that the bytes of pages are lost. They are unmapped from every process
 * before the call returns, from KVM's guests too, and nobody reads or writes them
 * any more: a process that touches one gets SIGBUS with si_code BUS_MCEERR_AR,
 * si_addr in the page and si_addr_lsb 12, as of a memory error of 4 KiB; a vCPU
 * the same or an exit, as KDP_MEMSLOT_POISON_SIGNAL says; an access in the kernel,
 * KVM's own and vhost's too, EFAULT.
 * Who waits for such a page goes on, to that. The other pages of its block are
 * mapped one by one, other blocks as before.
 *
 * Poison is beside a page's other state, demand paging on or off: that may change
 * meanwhile by any call, and counts again when the page is healed. A page that
 * is poisoned stays so, whatever is poisoned again, and is not counted in
 * @changed.
 *
 * KDP_POISON_HEAL: take the poison away. Before that the caller has put right
 * bytes there, or made the page absent. Pages that are not poisoned are not
 * counted.
 *
 * @done and @changed are written also when the call fails half-way.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: cause is 0 or KDP_CAUSE_HARDWARE, which no call can say, or not 0 with
 *    KDP_POISON_HEAL; nr_ranges is 0 or above max_ranges; a range is
 *    empty, overflows or runs past the memslot's end.
 *  - EHWPOISON: KDP_POISON_HEAL: a page of the range has a bad frame
 *    (KDP_CAUSE_HARDWARE); nothing of that range is healed.
 *  - EINTR: a fatal signal arrived; @done ranges are done.
 *  - ENOMEM: @done ranges are done, and a part of the next.
 */
struct kdp_poison {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 cause;
	__aligned_u64 ranges;
	__u32 nr_ranges;
	__u32 done;
	__u64 changed;
};
#define KDP_POISON	_IO(KDP_IOC_TYPE, 0x89)

#define KDP_POISON_HEAL	(1U << 0)

#define KDP_CAUSE_HARDWARE	1	/* a memory error: the frame is bad */
#define KDP_CAUSE_EMULATED	2	/* a call said so */
#define KDP_CAUSE_INHERITED	3	/* it was lost where the guest came from */

/**
 * struct kdp_poisoned - poisoned pages side by side
 * @first: the index of the first page
 * @count: how many
 * @cause: KDP_CAUSE_*
 * @__reserved: 0
 */
struct kdp_poisoned {
	__u64 first;
	__u64 count;
	__u32 cause;
	__u32 __reserved;
};

/**
 * struct kdp_poison_list - ioctl(KDP_POISON_LIST)
 * @size: sizeof(struct kdp_poison_list)
 * @flags: must be 0
 * @slot_id: the memslot
 * @count: in: room in the array, 1 to max_ranges; out: entries that were written
 * @first: in: the page to begin with; out: the page to go on with, nr_pages if
 *         that was the last entry
 * @poisoned: address of an array of struct kdp_poisoned
 *
 * List the poisoned pages of a memslot, in rising order, with the cause of each.
 * It is what a VMM hands on with the guest: whoever receives it poisons these
 * pages with KDP_CAUSE_INHERITED.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: count is 0 or above max_ranges; first is above nr_pages.
 */
struct kdp_poison_list {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 count;
	__u64 first;
	__aligned_u64 poisoned;
};
#define KDP_POISON_LIST	_IO(KDP_IOC_TYPE, 0x8a)

/**
 * struct kdp_replace - ioctl(KDP_REPLACE)
 * @size: sizeof(struct kdp_replace)
 * @flags: must be 0
 * @slot_id: the memslot
 * @memfd: a memfd of hugetlb with pages of the same size, open for writing, with
 *         F_SEAL_SHRINK and without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE
 * @first: the first page of the huge page that has a memory error
 * @offset: where in @memfd the fresh huge page is, in bytes: a hole, best
 * @copied: out: pages that were copied
 * @lost: out: pages that stay poisoned, because their bytes are lost
 * @healed: out: pages whose frames were bad and that were not present: they are no
 *          longer poisoned, and their content may come
 * @errors: out: pages that turned out to be bad when they were copied
 *
 * Replace a huge page of hugetlb that has memory errors by a fresh one, with the
 * guest running. The fresh huge page is allocated in @memfd, unless it is there, and
 * taken out of it; what it held is lost. It becomes a page of the memslot's own memfd,
 * in the place of the old one. Every memslot that has the huge page, of whatever VM, has
 * the fresh one from then on, and so has who maps the memslot's memfd anew or reads it.
 * (Who reads it while the call is under way sees there what was before.) The old one is
 * in no file any more, and the module does not keep it. (The kernel keeps a huge page with
 * a memory error from being used again.)
 *
 * Pages are copied in their order, 64 at a time, and nobody can access those
 * meanwhile: who tries waits until they are copied. All other pages can be accessed
 * as always. A page with KDP_CAUSE_HARDWARE has KDP_CAUSE_EMULATED after that:
 * its bytes are lost, its frame is good, and it may be healed.
 *
 * Once copying has begun the call goes on to the end, whatever signal comes.
 *
 * Errors beside the common ones, after which the memslot is as it was. (EFAULT, if
 * the answer cannot be written, comes after all is done.)
 *
 *  - EACCES, EBADF, EPERM: @memfd, as of KDP_MEMSLOT_CREATE.
 *  - EINVAL: the memslot is not on hugetlb; @first is not the first page of a huge
 *    page of the memslot; @memfd has pages of another size, or is the memslot's own;
 *    @offset is not a multiple of that size, or there is no whole huge page before
 *    @memfd's end.
 *  - ENXIO: the huge page has no memory error (KDP_CAUSE_HARDWARE).
 *  - ENOMEM: there is no free huge page.
 *  - EBUSY: somebody else has pinned the huge page (a device that may write to it),
 *    or maps or has pinned the fresh one; @memfd has memslots.
 *  - EINTR: a fatal signal came before copying has begun.
 *
 * KDP_MEMSLOT_CREATE fails with EBUSY for a memfd of which a huge page is just being
 * replaced.
 */
struct kdp_replace {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__s32 memfd;
	__u64 first;
	__u64 offset;
	__u64 copied;
	__u64 lost;
	__u64 healed;
	__u64 errors;
};
#define KDP_REPLACE	_IO(KDP_IOC_TYPE, 0x8b)

/**
 * struct kdp_place - ioctl(KDP_PLACE)
 * @size: sizeof(struct kdp_place)
 * @flags: must be 0
 * @slot_id: the memslot
 * @__reserved: must be 0
 * @first: the index of the first page
 * @count: how many, not 0
 * @data: address of the pages' bytes, 4096 for each
 * @results: address of a byte for each page, which is set to KDP_PLACED_*; or 0
 * @done: out: pages that were dealt with, in their order
 * @placed: out: those of them that have their bytes by this call
 *
 * Give absent pages their bytes and make them present, once: a page that is absent, or
 * zero and not yet touched, is filled, becomes present, and lets go who waits for
 * it, as by KDP_MARK. A page that is present is left alone, and so is one that is
 * poisoned, or claimed (KDP_CLAIM); none of these is an error. Of several that place
 * one page at the same time, by this call, one does.
 *
 * No mapping of the memfd is needed, so this is also how pages are filled in a huge
 * page that has a memory error, which the kernel lets nobody map.
 *
 * Do not fill the same pages through a mapping of the memfd at the same time: claim
 * them for that (KDP_CLAIM).
 *
 * @done and @placed are written also when the call fails half-way.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: the range is empty, overflows or runs past the memslot's end.
 *  - ENXIO: demand paging of the memslot is off.
 *  - EFAULT: @data or @results cannot be accessed; @done pages are done, and if that
 *    was @results, one more.
 *  - EINTR: a fatal signal arrived; @done pages are done.
 *  - ENOMEM: there is no memory for a page; @done pages are done.
 */
struct kdp_place {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__u32 __reserved;
	__u64 first;
	__u64 count;
	__aligned_u64 data;
	__aligned_u64 results;
	__u64 done;
	__u64 placed;
};
#define KDP_PLACE	_IO(KDP_IOC_TYPE, 0x8c)

#define KDP_PLACED_NOW		0	/* it has its bytes by this call */
#define KDP_PLACED_PRESENT	1	/* it was present */
#define KDP_PLACED_LOST		2	/* it is poisoned */
#define KDP_PLACED_CLAIMED	3	/* somebody has claimed it, and is filling it */

/**
 * struct kdp_claimant - ioctl(KDP_CLAIMANT)
 * @size: sizeof(struct kdp_claimant)
 * @flags: must be 0
 * @slot_id: the memslot
 * @fd: out: the claimant's fd, opened with O_CLOEXEC
 *
 * Make a claimant of a memslot: who fills pages not by KDP_PLACE, but through a
 * mapping of the memfd or by a device (RDMA), and is to be the only one who does. Its
 * fd takes KDP_CLAIM and KDP_COMMIT, and may be passed on: it is good for nothing
 * else. When the last descriptor of it is closed, as by its process's end, all that
 * it has claimed and not committed is given up.
 *
 * Errors beside the common ones:
 *
 *  - ENOSPC: the memslot has 64 claimants.
 *  - EMFILE: no file descriptor is left. ENFILE: the system has no open file left.
 */
struct kdp_claimant {
	__u32 size;
	__u32 flags;
	__u32 slot_id;
	__s32 fd;
};
#define KDP_CLAIMANT	_IO(KDP_IOC_TYPE, 0x8d)

/**
 * struct kdp_claim - ioctl(KDP_CLAIM) and ioctl(KDP_COMMIT), on a claimant's fd
 * @size: sizeof(struct kdp_claim)
 * @flags: KDP_CLAIM: must be 0; KDP_COMMIT: KDP_COMMIT_* flags
 * @first: the index of the first page
 * @count: how many, not 0
 * @results: address of a byte for each page, which is set to KDP_CLAIM_*; or 0
 * @done: out: pages that were dealt with, in their order
 * @changed: out: those of them of which the result is KDP_CLAIM_DONE
 *
 * KDP_CLAIM: claim pages that are not present: absent, zero, or still in their source.
 * From then on such a page is absent to whoever touches it: it is neither filled with
 * zeros nor read from its source; the toucher exits, or waits and there is an event,
 * as ever. KDP_PLACE and KDP_MARK leave it alone, but for KDP_STATE_ABSENT. A page
 * that is present, poisoned, or claimed already, by whomever, is not claimed. The
 * claimant writes the page's bytes where they are in the memfd.
 *
 * KDP_COMMIT: make claimed pages present, with all that was written to them before the
 * call. Who waits for them goes on. With KDP_COMMIT_ABANDON: give the claims up. The
 * page is what it was before, zero or in its source or absent, and who waits for it
 * goes on to that; if it is absent there is a new event, though an earlier one may
 * have been read. Either way the claims on the pages are over.
 *
 * A claim is void when its page is made absent, or poisoned (KDP_POISON, a memory
 * error), when its huge page is replaced (KDP_REPLACE), when demand paging is switched,
 * in any way, and when the memslot is removed. The claimant is told when it commits.
 * It goes on to write meanwhile, since the module cannot stop it: have it stop before
 * you do one of these, if others are to fill the page after that.
 *
 * A present bit that userspace has set by hand counts for more than a claim: who sets
 * that of a claimed page shows its guest a page half filled.
 *
 * @done and @changed are written also when the call fails half-way.
 *
 * Errors beside the common ones:
 *
 *  - ENOENT: KDP_CLAIM: the memslot was removed.
 *  - EINVAL: the range is empty, overflows or runs past the memslot's end.
 *  - ENXIO: KDP_CLAIM: demand paging of the memslot is off.
 *  - EFAULT: @results cannot be written; @done pages are done.
 *  - EINTR: a fatal signal arrived; @done pages are done.
 *  - ENOMEM: @done pages are done.
 */
struct kdp_claim {
	__u32 size;
	__u32 flags;
	__u64 first;
	__u64 count;
	__aligned_u64 results;
	__u64 done;
	__u64 changed;
};
#define KDP_CLAIM	_IO(KDP_IOC_TYPE, 0x8e)
#define KDP_COMMIT	_IO(KDP_IOC_TYPE, 0x8f)

/* Give the claims up instead. */
#define KDP_COMMIT_ABANDON	(1U << 0)

#define KDP_CLAIM_DONE		0	/* it is claimed, committed or given up by this call */
#define KDP_CLAIM_PRESENT	1	/* it is present; KDP_COMMIT: its bit was set by hand */
#define KDP_CLAIM_LOST		2	/* it is poisoned */
#define KDP_CLAIM_TAKEN		3	/* KDP_CLAIM: somebody has claimed it already */
#define KDP_CLAIM_VOID		4	/* KDP_COMMIT: the caller has no claim on it, or no
					 * longer: what it has written there does not count
					 */

/**
 * struct kdp_memfd - ioctl(KDP_MEMFD)
 * @size: sizeof(struct kdp_memfd)
 * @flags: must be 0
 * @length: the length of the file, in bytes
 * @fd: out: the file's descriptor, opened with O_CLOEXEC
 * @__reserved: must be 0
 *
 * Create a file of shared memory, as memfd_create(2) does. The kernel allocates it in
 * folios of 2 MiB where it can. The settings in /sys/kernel/mm/transparent_hugepage have
 * no effect on that, except shmem_enabled = "deny".
 *
 * The file has the seals F_SEAL_SHRINK and F_SEAL_EXEC; fcntl(2) adds others. The file
 * stays valid when the VM is closed.
 *
 * The call allocates no memory of the file. Each access to a hole allocates, clears and
 * charges 2 MiB. That may reach beyond @length, if @length is not a multiple of 2 MiB.
 *
 * Errors beside the common ones:
 *
 *  - EINVAL: the length is 0, or exceeds the maximum file size.
 *  - EOPNOTSUPP: the kernel has no transparent huge pages (KDP_FEATURE_MEMFD).
 *  - EMFILE: no file descriptor is left. ENFILE: the system has no open file left.
 */
struct kdp_memfd {
	__u32 size;
	__u32 flags;
	__u64 length;
	__s32 fd;
	__u32 __reserved;
};
#define KDP_MEMFD	_IO(KDP_IOC_TYPE, 0x90)

/*
 * Why KVM_RUN returned, in kvm_run.memory_fault.flags: one of these, and
 * KDP_EXIT_WRITE if the guest wrote.
 */
#define KDP_EXIT_ABSENT		(1ULL << 32)	/* the page is absent */
#define KDP_EXIT_NO_MEMORY	(1ULL << 33)	/* there is no memory for it */
#define KDP_EXIT_SOURCE_ERROR	(1ULL << 34)	/* its source cannot be read */
#define KDP_EXIT_RETRY		(1ULL << 35)	/* it was there, and was unmapped at that
						 * very moment: enter KVM_RUN again,
						 * nothing else is to be done
						 */
#define KDP_EXIT_POISONED	(1ULL << 36)	/* its bytes are lost */
#define KDP_EXIT_WRITE		(1ULL << 40)

/**
 * struct kdp_event - what read(2) on the VM's fd returns
 * @type: KDP_EVENT_*
 * @slot_id: the memslot
 * @page: the page, by its index in the memslot
 * @gfn: the page, by its guest frame number
 * @access: KDP_ACCESS_* of the access that came first
 * @tid: its thread, in the reader's pid namespace; 0 if it is not visible there
 * @waiters: threads that wait for the page now; 0 if all of them were
 *           interrupted or have died since an earlier delivery
 * @deliveries: how often this event has been read, this time included: above 1
 *              an earlier reader may have begun on it
 * @error: KDP_EVENT_SOURCE_ERROR: the errno value, positive; KDP_EVENT_POISONED:
 *         EHWPOISON; else 0
 * @__reserved: 0
 *
 * KDP_EVENT_ABSENT: somebody waits for an absent page. There is one event per page, however many
 * wait; mark the page present (or zero) to let them go on.
 *
 * read(2) returns as many whole events as there are and fit, at least one. It
 * blocks while there is none, or fails with EAGAIN if O_NONBLOCK is set. It
 * fails with EINVAL if the buffer cannot hold one event, with EFAULT if it
 * cannot be written (no event is lost then), with EINTR on a signal.
 *
 * An event that was read and not yet resolved is delivered again when the
 * process that read it has closed the VM's fd or has died. An event that nobody
 * has read is gone when nobody waits for the page any more; one that was read
 * stays until the page is resolved. A page that is present is never reported.
 *
 * KDP_EVENT_SOURCE_ERROR: a page could not be read from its source (KDP_SOURCE),
 * and the toucher was told so. Nobody waits, nothing is to be resolved, and it is
 * delivered once; @waiters is 0. While 64 of them are unread, no more are kept:
 * the counter source-errors in fdinfo counts them all.
 *
 * KDP_EVENT_POISONED: the kernel has found a memory error in the page's frame. It is
 * poisoned with KDP_CAUSE_HARDWARE, in each memslot that has it, and unmapped
 * everywhere; @access, @tid and @waiters are 0. It is delivered once, and is among
 * the 64 that are kept: KDP_POISON_LIST has all. Also an absent page is poisoned so:
 * its content is still to come, but not into that frame.
 *
 * When the last fd of the VM is closed, nobody can resolve events: waiters get
 * SIGBUS, and absent pages stay inaccessible for ever.
 */
struct kdp_event {
	__u32 type;
	__u32 slot_id;
	__u64 page;
	__u64 gfn;
	__u32 access;
	__s32 tid;
	__u32 waiters;
	__u32 deliveries;
	__s32 error;
	__u32 __reserved;
};

#define KDP_EVENT_ABSENT	1
#define KDP_EVENT_SOURCE_ERROR	2
#define KDP_EVENT_POISONED	3

#define KDP_ACCESS_WRITE	(1U << 0)	/* else a read or an execution */
#define KDP_ACCESS_EXEC		(1U << 1)
/* Exactly one of these says who: */
#define KDP_ACCESS_USER		(1U << 8)	/* a process, from user mode */
#define KDP_ACCESS_KERNEL	(1U << 9)	/* a copy in the kernel: KVM's own
						 * access, vhost, a system call
						 */
#define KDP_ACCESS_GUEST	(1U << 10)	/* KVM maps the page for a guest: a
						 * vCPU's stage-2 fault, or a page
						 * that KVM shares with the guest
						 */

#endif /* _UAPI_LINUX_KVM_DEMAND_PAGING_H */
