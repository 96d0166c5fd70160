// SPDX-License-Identifier: GPL-2.0
/*
 * A program that tests the disk of its guest: PID 1 of a Linux guest with a virtio-blk disk,
 * /dev/vda.
 *
 * Several processes, the workers, write to the disk and read from it with O_DIRECT. Each worker has
 * a part of the disk, divided into slots. It also has memory for each of its rounds: a chunk that
 * it writes, and two chunks that it reads to. It fills all of that memory before the first round.
 * Until a round has read, only the disk accesses the round's memory. So if a VMM stops the guest
 * and resumes it with absent memory, every later round does I/O to absent pages.
 *
 * In each round, a worker
 *
 *   - writes its chunk to the next slot,
 *   - reads that slot, and the slot that was written longest ago,
 *   - compares all words.
 *
 * Then it prints a line on the console:
 *
 *   KDP-DISK N round R
 *
 * At the first wrong word, or at an I/O error, it prints KDP-FAILED. After its last round it prints
 * "KDP-DISK N done", and ends.
 *
 * The kernel's command line may set
 *
 *   kdp_workers  processes (2)
 *   kdp_rounds   rounds of each (40)
 *   kdp_slots    slots of each (8)
 *   kdp_chunk    bytes of a chunk, and of a slot (65536)
 *   kdp_pause    milliseconds between rounds (50)
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "guest.h"
#include "modules.h"

#define DISK	"/dev/vda"
#define SECTOR	512UL
#define WORDS	(SECTOR / sizeof(uint64_t))
#define PAGE	4096UL

/* The disk never holds a page of this byte. */
#define JUNK	0xa5

static unsigned long rounds, slots, chunk, pause_ms;

struct worker {
	unsigned long number;
	int disk;
	char *from;
	char *to;
};

/* Word @i of a sector that a worker writes in a round. Rounds are counted from 1. */
static uint64_t word_of(uint64_t sector, unsigned long round, unsigned long i)
{
	return mix((uint64_t)round << 32 | sector) ^ i;
}

/* Where a worker writes in a round. */
static off_t place_of(const struct worker *worker, unsigned long round)
{
	return (off_t)((worker->number * slots + round % slots) * chunk);
}

static void fill(const struct worker *worker, unsigned long round, char *at)
{
	uint64_t sector = (uint64_t)place_of(worker, round) / SECTOR;
	uint64_t *words = (uint64_t *)at;

	for (; words < (uint64_t *)(at + chunk); words += WORDS, sector++)
		for (unsigned long i = 0; i < WORDS; i++)
			words[i] = word_of(sector, round, i);
}

static void check(const struct worker *worker, unsigned long round, const char *at)
{
	uint64_t sector = (uint64_t)place_of(worker, round) / SECTOR;
	const uint64_t *words = (const uint64_t *)at;

	for (; words < (const uint64_t *)(at + chunk); words += WORDS, sector++)
		for (unsigned long i = 0; i < WORDS; i++)
			if (words[i] != word_of(sector, round, i)) {
				printf("KDP-FAILED word %lu of sector %llu of round %lu is %#llx\n",
				       i, (unsigned long long)sector, round,
				       (unsigned long long)words[i]);
				reset();
			}
}

static void read_chunk(const struct worker *worker, unsigned long round, char *to)
{
	if (pread(worker->disk, to, chunk, place_of(worker, round)) != (ssize_t)chunk)
		die("read from the disk");
}

static void *map(unsigned long bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	/* Small pages, so that they are anywhere in memory. */
	if (at == MAP_FAILED || madvise(at, bytes, MADV_NOHUGEPAGE))
		die("memory");
	memset(at, JUNK, bytes);
	return at;
}

static void work(unsigned long number)
{
	const struct timespec pause = { pause_ms / 1000, pause_ms % 1000 * 1000000 };
	struct worker worker = { .number = number };

	worker.disk = open(DISK, O_RDWR | O_DIRECT);
	if (worker.disk < 0)
		die(DISK);
	worker.from = map(rounds * chunk);
	worker.to = map(2 * rounds * chunk);
	for (unsigned long round = 1; round <= rounds; round++)
		fill(&worker, round, worker.from + (round - 1) * chunk);

	for (unsigned long round = 1; round <= rounds; round++) {
		const char *from = worker.from + (round - 1) * chunk;
		char *to = worker.to + 2 * (round - 1) * chunk;
		unsigned long oldest = round < slots ? 1 : round - slots + 1;

		if (pwrite(worker.disk, from, chunk, place_of(&worker, round)) != (ssize_t)chunk)
			die("write to the disk");
		read_chunk(&worker, round, to);
		read_chunk(&worker, oldest, to + chunk);
		check(&worker, round, to);
		check(&worker, oldest, to + chunk);
		check(&worker, round, from);
		printf("KDP-DISK %lu round %lu\n", number, round);
		nanosleep(&pause, NULL);
	}
	printf("KDP-DISK %lu done\n", number);
	_exit(0);
}

int main(void)
{
	unsigned long workers;
	const char *rejected;

	if (open_console())
		return 1;
	rejected = insert_modules();
	if (rejected)
		die(rejected);
	workers = wanted("kdp_workers", 2);
	rounds = wanted("kdp_rounds", 40);
	slots = wanted("kdp_slots", 8);
	chunk = wanted("kdp_chunk", 65536);
	pause_ms = wanted("kdp_pause", 50);
	if (!workers || !rounds || !slots || !chunk || chunk % PAGE) {
		errno = EINVAL;
		die("the command line");
	}
	for (unsigned long number = 0; number < workers; number++)
		switch (fork()) {
		case -1:
			die("fork");
			break;
		case 0:
			work(number);
		}
	while (wait(NULL) > 0)
		;
	/* PID 1 must not end. */
	for (;;)
		pause();
}
