/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shows how much a guest works while a page is absent. One process reads pages in turn, with
 * pauses. Another process counts without a pause. The host finds these pages by their first two
 * words:
 *
 *   WAITS_MAGIC, 0    word 2 is the counter of the other process
 *   WAITS_MAGIC, n    the first process reads this page as number n, from 1 on
 */
#ifndef KDP_GUEST_WAITS_H
#define KDP_GUEST_WAITS_H

#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WAITS_PAGE	4096UL
#define WAITS_MAGIC	0x6b64702d77616974ULL

/* Returns only if something fails: the name of what failed. */
static const char *work_while_one_waits(unsigned long pages)
{
	const struct timespec pause = { .tv_nsec = 2 * 1000000L };
	const unsigned long words = WAITS_PAGE / sizeof(uint64_t);
	volatile uint64_t *at = mmap(NULL, (pages + 1) * WAITS_PAGE, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		return "mmap";
	for (unsigned long n = 0; n <= pages; n++) {
		at[n * words] = WAITS_MAGIC;
		at[n * words + 1] = n;
	}
	switch (fork()) {
	case -1:
		return "fork";
	case 0:
		for (;;)
			at[2]++;
	}
	printf("KDP-WAITS %lu pages\n", pages);
	for (;;)
		for (unsigned long n = 1; n <= pages; n++) {
			if (at[n * words + 1] != n)
				return "a page that is read";
			clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
		}
}

#endif
