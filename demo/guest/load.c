// SPDX-License-Identifier: GPL-2.0
/*
 * A load that checks itself: PID 1 of a Linux whose memory is moved, given back and fetched while it runs.
 *
 * Each page that it writes holds its own number, the sequence number of the write, words made of both, and a sum over all.
 * It writes pages in an order that looks random, looks at each before it is written anew, and at all of them now and then:
 * a page that is lost, old, doubled or in another's place is found. A line a round on the console:
 *
 *   KDP-LOAD round N wrote W checked C churned H ns T
 *
 * and KDP-LOAD BAD with what was wrong, after which it goes on. T is the guest's clock, which must not jump.
 *
 * The kernel's command line may set
 *
 *   kdp_mib      the size of the pages in MiB (16)
 *   kdp_writes   pages written in a round (512)
 *   kdp_check    rounds until it looks at all of its pages (16)
 *   kdp_churn    MiB that a second process allocates, fills, checks and frees all the time (0: none), in parts, so that
 *                free memory is told of and used again
 *   kdp_churn_pause  milliseconds between those parts (0)
 *   kdp_spike    MiB that are allocated, written and freed once (0: none)
 *   kdp_spike_at the round before which they are (1)
 *   kdp_rounds   rounds until it checks everything, says "KDP-LOAD done" and resets the machine (0: for ever)
 *   kdp_pause    milliseconds between rounds (20)
 *   kdp_waits    if not 0, it replaces the load: one process reads so many pages in turn, and
 *                another process counts; see waits.h (0)
 */
#include <sys/mman.h>
#include <time.h>

#include "guest.h"
#include "modules.h"
#include "waits.h"

#define PAGE	4096UL
#define WORDS	(PAGE / sizeof(uint64_t))
#define MIB	(1UL << 20)

/* The first words of a page. */
enum { NUMBER, SEQUENCE, SUM, FIRST };

struct area {
	const char *name;
	uint64_t *words;
	uint64_t *sequences;
	unsigned long pages;
	uint64_t writes;
	uint64_t checks;
	uint64_t random;
};

static uint64_t next(struct area *area)
{
	area->random = mix(area->random);
	return area->random;
}

static uint64_t sum_of(const uint64_t *page)
{
	uint64_t sum = 0xcbf29ce484222325ULL;

	for (unsigned long i = 0; i < WORDS; i++)
		if (i != SUM)
			sum = (sum ^ page[i]) * 0x100000001b3ULL;
	return sum;
}

static void *map(unsigned long bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static void write_page(struct area *area, unsigned long n)
{
	uint64_t *page = area->words + n * WORDS;
	uint64_t sequence = ++area->sequences[n];

	page[NUMBER] = n;
	page[SEQUENCE] = sequence;
	for (unsigned long i = FIRST; i < WORDS; i++)
		page[i] = mix(n << 32 ^ sequence << 10 ^ i);
	page[SUM] = sum_of(page);
	area->writes++;
}

/* Whether a page is what was written to it last; one that never was is zeros. */
static int check_page(struct area *area, unsigned long n)
{
	const uint64_t *page = area->words + n * WORDS;

	area->checks++;
	if (area->sequences[n] == 0) {
		for (unsigned long i = 0; i < WORDS; i++)
			if (page[i]) {
				printf("KDP-LOAD BAD %s page %lu was never written, word %lu is %#llx\n", area->name, n, i,
				       (unsigned long long)page[i]);
				return 1;
			}
		return 0;
	}
	if (page[NUMBER] == n && page[SEQUENCE] == area->sequences[n] && page[SUM] == sum_of(page))
		return 0;
	printf("KDP-LOAD BAD %s page %lu sequence %llu: it says page %llu sequence %llu, the sum is %s\n", area->name, n,
	       (unsigned long long)area->sequences[n], (unsigned long long)page[NUMBER],
	       (unsigned long long)page[SEQUENCE], page[SUM] == sum_of(page) ? "right" : "wrong");
	return 1;
}

static int check_all(struct area *area)
{
	int bad = 0;

	for (unsigned long n = 0; n < area->pages; n++)
		bad |= check_page(area, n);
	return bad;
}

static void open_area(struct area *area, const char *name, unsigned long pages)
{
	*area = (struct area){ .name = name, .pages = pages, .random = pages };
	area->words = map(pages * PAGE);
	area->sequences = map(pages * sizeof(uint64_t));
}

static void close_area(struct area *area)
{
	/*
	 * In this order: what is freed last is used first, and of these there is a page in every 2 MiB of the others, none of
	 * which would be free as a whole again.
	 */
	munmap(area->sequences, area->pages * sizeof(uint64_t));
	munmap(area->words, area->pages * PAGE);
}

static void sleep_ms(unsigned long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };

	nanosleep(&time, NULL);
}

/*
 * Takes memory, fills and checks it, and gives it back, part by part, for ever. The number of pages so
 * far is in @churned.
 */
static void churn(unsigned long mib, unsigned long pause, volatile uint64_t *churned)
{
	struct area area;
	uint64_t random = 1;

	for (;;) {
		random = mix(random);
		open_area(&area, "churned", (random % mib + 1) * MIB / PAGE);
		for (unsigned long n = 0; n < area.pages; n++)
			write_page(&area, n);
		check_all(&area);
		*churned += area.pages;
		close_area(&area);
		if (pause)
			sleep_ms(pause);
	}
}

static void spike(unsigned long mib)
{
	struct area area;

	if (!mib)
		return;
	open_area(&area, "peak", mib * MIB / PAGE);
	for (unsigned long n = 0; n < area.pages; n++)
		write_page(&area, n);
	check_all(&area);
	close_area(&area);
	printf("KDP-LOAD peak of %lu MiB is over\n", mib);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

int main(void)
{
	unsigned long writes, check, rounds, churned_mib, spike_at, pause;
	volatile uint64_t *churned;
	const char *rejected;
	struct area area;

	if (open_console())
		return 1;
	rejected = insert_modules();
	if (rejected)
		die(rejected);
	if (wanted("kdp_waits", 0))
		die(work_while_one_waits(wanted("kdp_waits", 0)));

	writes = wanted("kdp_writes", 512);
	check = wanted("kdp_check", 16);
	rounds = wanted("kdp_rounds", 0);
	churned_mib = wanted("kdp_churn", 0);
	pause = wanted("kdp_pause", 20);
	spike_at = wanted("kdp_spike_at", 1);
	churned = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (churned == MAP_FAILED)
		die("mmap");
	if (churned_mib) {
		switch (fork()) {
		case -1:
			die("fork");
			break;
		case 0:
			churn(churned_mib, wanted("kdp_churn_pause", 0), churned);
		}
	}

	open_area(&area, "own", wanted("kdp_mib", 16) * MIB / PAGE);
	if (!area.pages || !check) {
		errno = EINVAL;
		die(check ? "kdp_mib" : "kdp_check");
	}
	for (unsigned long round = 1; !rounds || round <= rounds; round++) {
		if (round == spike_at)
			spike(wanted("kdp_spike", 0));
		for (unsigned long i = 0; i < writes; i++) {
			unsigned long n = next(&area) % area.pages;

			check_page(&area, n);
			write_page(&area, n);
		}
		if (round % check == 0)
			check_all(&area);
		printf("KDP-LOAD round %lu wrote %llu checked %llu churned %llu ns %llu\n", round,
		       (unsigned long long)area.writes, (unsigned long long)area.checks,
		       (unsigned long long)*churned, (unsigned long long)now());
		sleep_ms(pause);
	}
	if (!check_all(&area))
		printf("KDP-LOAD done, all of %lu pages are right\n", area.pages);
	reset();
}
