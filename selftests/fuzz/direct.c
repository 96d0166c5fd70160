// SPDX-License-Identifier: GPL-2.0
/* Direct I/O between guest memory and a block device; swap space. */
#include <linux/loop.h>
#include <sys/swap.h>

#include "model.h"

#define SWAP_PAGES	4096

/*
 * Sets up a loop device of a new memfd. The kernel removes the device when its last user closes it.
 * Returns a descriptor of the device, or -1.
 */
static int loop_new(__u64 pages, char *path, size_t len, unsigned char **bytes)
{
	struct loop_config config = { .block_size = 512, .info.lo_flags = LO_FLAGS_AUTOCLEAR };
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), fd = -1, number;

	config.fd = memfd_sealed(0, pages, 0);
	*bytes = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, config.fd, 0);
	for (int i = 0; i < 100 && control >= 0 && *bytes != MAP_FAILED && fd < 0; i++) {
		number = ioctl(control, LOOP_CTL_GET_FREE);
		if (number < 0)
			break;
		snprintf(path, len, "/dev/loop%d", number);
		fd = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
		/* Another process may have taken this device. */
		if (fd >= 0 && ioctl(fd, LOOP_CONFIGURE, &config)) {
			close(fd);
			fd = -1;
		}
	}
	if (control >= 0)
		close(control);
	close(config.fd);
	return fd;
}

/* Adds swap space, so that MADV_PAGEOUT swaps pages. */
static bool swap_start(struct disk *disk)
{
	/* From byte 1024: version, last page, bad pages. See union swap_header in linux/swap.h. */
	const __u32 header[3] = { 1, SWAP_PAGES - 1, 0 };
	char *path = disk->swap;
	unsigned char *bytes;
	int fd = loop_new(SWAP_PAGES, path, sizeof(disk->swap), &bytes), err;

	if (fd < 0)
		return false;
	memcpy(bytes + 1024, header, sizeof(header));
	memcpy(bytes + PAGE - 10, "SWAPSPACE2", 10);
	err = swapon(path, 0);
	munmap(bytes, SWAP_PAGES * PAGE);
	close(fd);
	return !err;
}

void disk_start(struct model *m)
{
	char path[32];

	m->disk.fd = loop_new(DISK_PAGES, path, sizeof(path), &m->disk.bytes);
	if (m->disk.fd < 0 || !swap_start(&m->disk))
		printf("# no loop device: there is no direct I/O, or no swap\n");
}

void disk_stop(struct model *m)
{
	swapoff(m->disk.swap);
	close(m->disk.fd);
}

/* A transfer waits for absent pages: resolve them one after the other. */
static void resolve(struct model *m, struct mslot *s, struct toucher *t, __u64 first, __u64 count,
		    bool own)
{
	for (__u64 page = first; page < first + count && !m->failed; page++) {
		__u32 state = chance(&m->r, 50) ? KDP_STATE_PRESENT : KDP_STATE_ZERO;

		if (model_outcome(s, page, own) != WAITS)
			continue;
		if (t->done || !toucher_asleep(t))
			model_fail(m, "slot %u page %llu is absent, and I/O does not wait", s->id,
				   page);
		if (kdp_mark(m->vm[s->vm], s->id, state, page, 1).changed != 1)
			model_fail(m, "slot %u page %llu was not absent", s->id, page);
		s->state[page] = state;
	}
}

/* After a transfer: update the model, and check that the memory's page equals the disk's. */
static void transferred(struct model *m, struct mslot *s, __u64 page, bool own, bool reads,
			__u64 at)
{
	const unsigned char *p = (own ? s->own : s->guest) + page * PAGE;
	__u64 *head = &s->mem->head[s->first + page], *tail = &s->mem->tail[s->first + page];
	struct disk *disk = &m->disk;

	if (model_outcome(s, page, own) == FILLS)
		model_zero_fill(s, page);
	if (own && reads)
		s->copied[page] = true;
	if (own && s->copied[page]) {
		head = &s->own_head[page];
		tail = &s->own_tail[page];
	}
	if (reads) {
		*head = disk->head[at];
		*tail = disk->tail[at];
	} else {
		disk->head[at] = *head;
		disk->tail[at] = *tail;
	}
	if (!model_holds(p, *head, *tail) || memcmp(p, disk->bytes + at * PAGE, PAGE))
		model_fail(m, "slot %u page %llu is not page %llu of the disk", s->id, page, at);
}

/* Write pages of guest memory to the disk, or read them from it. */
void op_direct(struct model *m)
{
	struct mslot *s = any_slot(m, LIFE_ORPHAN);
	bool reads = chance(&m->r, 50), own, waits = false;
	__u64 first, count, at;
	enum outcome outcome;
	struct toucher t;

	if (!s || m->disk.fd < 0)
		return;
	own = s->own && chance(&m->r, 30);
	first = pick(&m->r, s->pages);
	count = 1 + pick(&m->r, 8);
	if (count > s->pages - first)
		count = s->pages - first;
	outcome = model_outcome(s, first, own);
	/* If a transfer fails, nothing defines how much of it was done: transfer one page. */
	if (s->life != LIFE_LISTED)
		count = 1;
	/* The kernel does no direct I/O to VM_PFNMAP memory. */
	if (s->mem->huge)
		outcome = FAILS;
	for (__u64 page = first; page < first + count && outcome != FAILS; page++) {
		if (model_outcome(s, page, own) != WAITS)
			continue;
		waits = true;
		/* If two threads wait for a page, their order is not defined. */
		if (model_has_waiter(m, s, page, false))
			return;
	}
	/* Waiting costs a thread and time: do not wait in every op. */
	if (waits && !chance(&m->r, 20))
		return;
	at = pick(&m->r, DISK_PAGES - count + 1);
	t = (struct toucher){ .fd = m->disk.fd, .bytes = count * PAGE, .at = at * PAGE };
	log_op(&m->log, reads ? "from disk" : "to disk", s->vm, s->id, first, count, own);
	if (!toucher_start(&t, (own ? s->own : s->guest) + first * PAGE,
			   reads ? TOUCH_FROM_FILE : TOUCH_TO_FILE)) {
		model_fail(m, "no thread: %s", strerror(errno));
		return;
	}
	if (waits)
		resolve(m, s, &t, first, count, own);
	if (m->failed)
		return;
	if (!toucher_join(&t)) {
		model_fail(m, "I/O of slot %u does not end", s->id);
		return;
	}
	log_result(&m->log, t.result);
	/* When the VM is closed, an access to a zero page may work or fail. */
	if (outcome == FILLS && s->life == LIFE_ORPHAN && t.result == EFAULT)
		return;
	if (t.result != (outcome == FAILS ? EFAULT : 0))
		model_fail(m, "direct I/O of slot %u page %llu: '%s'", s->id, first,
			   strerror(t.result));
	for (__u64 i = 0; i < count && outcome != FAILS && !m->failed; i++)
		transferred(m, s, first + i, own, reads, at + i);
}
