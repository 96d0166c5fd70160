// SPDX-License-Identifier: GPL-2.0
/*
 * The guest of the demo: PID 1 of a Linux that has nothing else.
 *
 * It fills a tmpfs with data whose checksums it keeps, then does two things for ever: it counts on the console
 * ("KDP-TICK n", one each TICK_MS), and it reads the data again and compares ("KDP-VERIFY ok k"). Whoever stops
 * this guest, moves its memory and lets it go on sees from the console alone whether anything was lost: the next
 * number must follow the last one, and no line may say BAD.
 *
 * The kernel's command line may set kdp_mib, the size of that data in MiB, and kdp_cold, that of a second file which
 * is written and never read: most of a real guest's memory is not in use at any moment. With kdp_victim=1 a third
 * process tells where a page of its memory is ("KDP-VICTIM 0xADDRESS", guest physical), reads it again and again from
 * user mode, and tells of the signal that it gets when that page has a memory error ("KDP-SIGBUS code C lsb L").
 */
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include "guest.h"

#define TICK_MS		25
#define BLOCK		(1UL << 20)
#define WORDS		(BLOCK / sizeof(uint64_t))
#define MAX_BLOCKS	1024
#define CHUNK		(64UL << 10)

static uint64_t sums[MAX_BLOCKS];
static uint64_t buffer[WORDS];

/* Every word of every block differs, so the check finds a page that is in another page's place. */
static uint64_t word_at(uint64_t n)
{
	return mix(n * 0x9e3779b97f4a7c15ULL);
}

static uint64_t sum_of(const uint64_t *words, size_t n)
{
	uint64_t sum = 0xcbf29ce484222325ULL;

	for (size_t i = 0; i < n; i++)
		sum = (sum ^ words[i]) * 0x100000001b3ULL;
	return sum;
}

static void read_block(int fd, unsigned int block)
{
	char *to = (char *)buffer;

	for (size_t done = 0; done < BLOCK;) {
		ssize_t n = pread(fd, to + done, CHUNK, (off_t)(block * BLOCK + done));

		if (n <= 0)
			die("read of the data");
		done += (size_t)n;
	}
}

/* The blocks of a file are numbered from @first. */
static int fill(const char *path, unsigned int first, unsigned int blocks)
{
	int fd = open(path, O_RDWR | O_CREAT, 0600);

	if (fd < 0)
		die(path);
	for (unsigned int b = first; b < first + blocks; b++) {
		for (size_t i = 0; i < WORDS; i++)
			buffer[i] = word_at(b * WORDS + i);
		sums[b] = sum_of(buffer, WORDS);
		if (write(fd, buffer, BLOCK) != (ssize_t)BLOCK)
			die(path);
	}
	return fd;
}

static void tick(void)
{
	const struct timespec pause = { .tv_nsec = TICK_MS * 1000000L };

	for (unsigned long n = 1;; n++) {
		printf("KDP-TICK %lu\n", n);
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
	}
}

static void verify(int fd, unsigned int blocks)
{
	for (unsigned long round = 1;; round++) {
		unsigned int bad = 0;

		for (unsigned int b = 0; b < blocks; b++) {
			read_block(fd, b);
			if (sum_of(buffer, WORDS) != sums[b]) {
				printf("KDP-VERIFY BAD round %lu block %u\n", round, b);
				bad++;
			}
		}
		if (!bad)
			printf("KDP-VERIFY ok %lu\n", round);
	}
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)context;
	/* It came from the one access that this process makes: printf() is not under way. */
	printf("KDP-SIGBUS code %d lsb %d\n", info->si_code, info->si_addr_lsb);
	_exit(0);
}

/* The guest physical address of a page that is in memory (proc_pid_pagemap(5)). */
static uint64_t physical(const void *page)
{
	const uint64_t frames = (1ULL << 55) - 1;
	uint64_t entry;
	int fd;

	mkdir("/proc", 0755);
	if (mount("proc", "/proc", "proc", 0, NULL))
		die("mount of /proc");
	fd = open("/proc/self/pagemap", O_RDONLY);
	if (fd < 0 || pread(fd, &entry, sizeof(entry), (uintptr_t)page / 4096 * sizeof(entry)) != sizeof(entry))
		die("/proc/self/pagemap");
	close(fd);
	return (entry & frames) * 4096;
}

static void victim(void)
{
	const struct timespec pause = { .tv_nsec = 10 * 1000000L };
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	volatile uint64_t *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (page == MAP_FAILED || mlock((void *)page, 4096) || sigaction(SIGBUS, &action, NULL))
		die("the page to lose");
	for (size_t i = 0; i < 4096 / sizeof(*page); i++)
		page[i] = word_at(i);
	printf("KDP-VICTIM %#llx\n", (unsigned long long)physical((void *)page));
	for (;;) {
		for (size_t i = 0; i < 4096 / sizeof(*page); i++)
			if (page[i] != word_at(i))
				printf("KDP-VERIFY BAD word %zu of the page to lose\n", i);
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
	}
}

static unsigned int wanted_blocks(const char *name, unsigned long otherwise)
{
	unsigned long n = wanted(name, otherwise);

	if (n > MAX_BLOCKS / 2) {
		errno = EINVAL;
		die(name);
	}
	return (unsigned int)n;
}

int main(void)
{
	unsigned int blocks, cold;
	int fd;

	if (open_console())
		return 1;

	blocks = wanted_blocks("kdp_mib", 32);
	cold = wanted_blocks("kdp_cold", 0);
	mkdir("/data", 0755);
	if (mount("data", "/data", "tmpfs", 0, "size=90%"))
		die("mount of the tmpfs");
	fd = fill("/data/warm", 0, blocks);
	fill("/data/cold", blocks, cold);
	printf("KDP-READY\n");

	if (wanted("kdp_victim", 0) && fork() == 0)
		victim();
	switch (fork()) {
	case -1:
		die("fork");
		break;
	case 0:
		verify(fd, blocks);
		break;
	default:
		tick();
	}
	return 1;
}
