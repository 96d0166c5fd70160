// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The smallest VMM whose guest's memory is paged in on demand.
 *
 * The guest, 24 bytes of code, adds up a word of each of 128 pages and writes
 * the sum to a port. All of its memory is absent when it starts, its code too.
 * What its vCPU touches comes back from KVM_RUN; what anybody else touches
 * comes as an event.
 *
 * Build: gcc -O2 -Wall -pthread -I include/uapi -o DIR/minimal minimal.c
 * Run, as root: DIR/minimal, or DIR/minimal hugetlb (one free 2 MiB page)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>
#include <linux/kvm_demand_paging.h>
#include <linux/memfd.h>

#define PAGE		4096UL
#define BYTES		(2UL << 20)
#define PAGES		(BYTES / PAGE)
#define SLOT		0
#define CODE_PAGE	1
#define FIRST		16	/* the guest reads pages FIRST to LAST */
#define LAST		143
#define VMM_PAGE	200	/* and the VMM itself this one */
#define PORT		0x10

static const uint8_t code[] = {
	0x31, 0xc0,			/*	xor	ax, ax		*/
	0xbb, 0x00, 0x10,		/*	mov	bx, 0x1000	*/
	0x8e, 0xdb,			/* 1:	mov	ds, bx		*/
	0x03, 0x06, 0x00, 0x00,		/*	add	ax, [0]		*/
	0x81, 0xc3, 0x00, 0x01,		/*	add	bx, 0x100	*/
	0x81, 0xfb, 0x00, 0x90,		/*	cmp	bx, 0x9000	*/
	0x72, 0xf0,			/*	jb	1b		*/
	0xe7, PORT,			/*	out	PORT, ax	*/
	0xf4,				/*	hlt			*/
};

static int vm;			/* ours: /dev/kvm-demand-paging */
static unsigned char *alias;	/* the memfd itself: where pages are filled */
static unsigned char *guest;	/* the memslot: what KVM and the VMM use */
static _Atomic uint64_t *bitmap;
static pthread_mutex_t filling = PTHREAD_MUTEX_INITIALIZER;
static unsigned int by_exit;
static _Atomic unsigned int by_event;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int check(int ret, const char *what)
{
	if (ret < 0)
		die(what);
	return ret;
}

static void *map(int fd, size_t bytes, off_t offset, const char *what)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	if (p == MAP_FAILED)
		die(what);
	return p;
}

/* Where the pages come from. A real VMM asks a file or another machine. */
static uint16_t word_of(uint64_t page)
{
	return page * 2654435761u >> 7;
}

static void fetch(uint64_t page, void *to)
{
	uint16_t word = word_of(page);

	memset(to, 0, PAGE);
	if (page == CODE_PAGE)
		memcpy(to, code, sizeof(code));
	else
		memcpy(to, &word, sizeof(word));
}

/* Data, then bit. Two threads may want one page: it is placed once. */
static void place(uint64_t page)
{
	uint64_t bit = 1ULL << (page % 64);
	_Atomic uint64_t *word = &bitmap[page / 64];

	pthread_mutex_lock(&filling);
	if (!(atomic_load_explicit(word, memory_order_acquire) & bit)) {
		fetch(page, alias + page * PAGE);
		atomic_fetch_or_explicit(word, bit, memory_order_release);
	}
	pthread_mutex_unlock(&filling);
}

/* Whoever is not a vCPU in a stage-2 fault waits, and is told of here. */
static void *handler(void *arg)
{
	struct kdp_event ev;

	(void)arg;
	for (;;) {
		check(read(vm, &ev, sizeof(ev)), "read of an event");
		place(ev.page);
		by_event++;

		/* The bit lets the page be mapped; the mark wakes who waits. */
		struct kdp_range range = { .first = ev.page, .count = 1 };
		struct kdp_mark mark = {
			.size = sizeof(mark),
			.slot_id = ev.slot_id,
			.state = KDP_STATE_PRESENT,
			.ranges = (uintptr_t)&range,
			.nr_ranges = 1,
		};
		check(ioctl(vm, KDP_MARK, &mark), "KDP_MARK");
	}
	return NULL;
}

static int set_up_memory(int huge)
{
	int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
	int memfd = check(memfd_create("guest", flags), "memfd_create");

	check(ftruncate(memfd, BYTES), "ftruncate");
	check(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK), "F_SEAL_SHRINK");
	alias = map(memfd, BYTES, 0, "mmap of the memfd");

	vm = check(open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC), KDP_DEVICE_PATH);
	struct kdp_memslot_create create = {
		.size = sizeof(create),
		.flags = KDP_MEMSLOT_PAGING,
		.slot_id = SLOT,
		.memfd = memfd,
		.base_gfn = 0,
		.nr_pages = PAGES,
	};
	check(ioctl(vm, KDP_MEMSLOT_CREATE, &create), "KDP_MEMSLOT_CREATE");
	guest = map(create.fd, BYTES, 0, "mmap of the memslot");
	bitmap = map(create.fd, (PAGES / 8 + PAGE - 1) & -PAGE, KDP_BITMAP_OFFSET, "mmap of the bitmap");
	return memfd;
}

/* A KVM machine with our memory at guest physical address 0, and its vCPU. */
static int set_up_vcpu(struct kvm_run **run)
{
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int machine = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	struct kvm_userspace_memory_region region = {
		.memory_size = BYTES,
		.userspace_addr = (uintptr_t)guest,
	};
	struct kvm_regs regs = { .rip = CODE_PAGE * PAGE, .rflags = 2 };
	struct kvm_sregs sregs;
	int vcpu;

	if (ioctl(machine, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0)
		check(ioctl(machine, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	check(ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	vcpu = check(ioctl(machine, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	*run = map(vcpu, check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"), 0, "kvm_run");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	return vcpu;
}

/* Runs the guest to its end; returns what it wrote to the port. */
static uint16_t run_guest(int vcpu, struct kvm_run *run)
{
	struct kdp_vcpu_exits exits = { .size = sizeof(exits), .mode = KDP_EXITS_ON };
	uint16_t sum = 0;

	/* For this thread: it is the one that runs the vCPU. */
	check(ioctl(vm, KDP_VCPU_EXITS, &exits), "KDP_VCPU_EXITS");
	for (;;) {
		int ret = ioctl(vcpu, KVM_RUN, 0);

		if (ret < 0 && errno == EINTR)
			continue;
		if (ret < 0 && errno == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
			if (run->memory_fault.flags & KDP_EXIT_RETRY)
				continue;
			if (!(run->memory_fault.flags & KDP_EXIT_ABSENT)) {
				fprintf(stderr, "fault at 0x%llx, flags 0x%llx\n", run->memory_fault.gpa,
					run->memory_fault.flags);
				exit(1);
			}
			by_exit++;
			place(run->memory_fault.gpa / PAGE);
			continue;
		}
		check(ret, "KVM_RUN");
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			memcpy(&sum, (char *)run + run->io.data_offset, sizeof(sum));
			break;
		case KVM_EXIT_HLT:
			return sum;
		default:
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	struct kvm_run *run;
	uint16_t want = 0, word, sum;
	pthread_t thread;
	int vcpu;

	set_up_memory(argc > 1 && !strcmp(argv[1], "hugetlb"));
	if (pthread_create(&thread, NULL, handler, NULL))
		die("pthread_create");

	memcpy(&word, guest + VMM_PAGE * PAGE, sizeof(word));
	printf("the VMM read page %d: %s\n", VMM_PAGE, word == word_of(VMM_PAGE) ? "right" : "WRONG");

	vcpu = set_up_vcpu(&run);
	sum = run_guest(vcpu, run);
	for (int page = FIRST; page <= LAST; page++)
		want += word_of(page);
	printf("the guest's sum is %u: %s\n", sum, sum == want ? "right" : "WRONG");
	printf("of %lu pages %u came by exits, %u by events\n", PAGES, by_exit, by_event);
	return sum == want && word == word_of(VMM_PAGE) ? 0 : 1;
}
