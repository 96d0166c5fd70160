/* SPDX-License-Identifier: GPL-2.0 */
/* Functions of the programs that run as PID 1 of a Linux guest. */
#ifndef KDP_GUEST_H
#define KDP_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

static void reset(void)
{
	fflush(stdout);
	/* The console must get the line out before the machine ends. */
	sleep(1);
	reboot(RB_AUTOBOOT);
	_exit(1);
}

static void die(const char *what)
{
	printf("KDP-FAILED %s: %s\n", what, strerror(errno));
	reset();
}

/* splitmix64 */
static uint64_t mix(uint64_t z)
{
	z += 0x9e3779b97f4a7c15ULL;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

/* The number that the kernel's command line gives to @name, or @otherwise if it has none. */
static unsigned long wanted(const char *name, unsigned long otherwise)
{
	const char *text = getenv(name);

	return text ? strtoul(text, NULL, 10) : otherwise;
}

/* Mounts /dev, and makes the serial port the standard input and output. Returns 0, or -1. */
static int open_console(void)
{
	int console;

	mkdir("/dev", 0755);
	if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) && errno != EBUSY)
		return -1;
	console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
	if (console < 0)
		return -1;
	dup2(console, 0);
	dup2(console, 1);
	dup2(console, 2);
	/* One write per line: the lines of two processes must not mix. */
	setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
	printf("KDP-USERSPACE\n");
	return 0;
}

#endif
