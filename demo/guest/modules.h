/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Inserts the kernel modules of the initramfs. A distribution's kernel has drivers as modules
 * that other test kernels have built in.
 */
#ifndef KDP_GUEST_MODULES_H
#define KDP_GUEST_MODULES_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MODULES	"/modules"

static int is_module(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

/*
 * Insert the files of /modules in the order of their names. It is no error if there is no such
 * folder. Returns NULL, or the name of the module that the kernel rejected, with errno set.
 */
static const char *insert_modules(void)
{
	struct dirent **entries;
	int n = scandir(MODULES, &entries, is_module, alphasort);

	if (n < 0)
		return errno == ENOENT ? NULL : MODULES;
	for (int i = 0; i < n; i++) {
		const char *name = entries[i]->d_name;
		char path[sizeof(MODULES) + sizeof(entries[i]->d_name)];
		int fd;

		snprintf(path, sizeof(path), MODULES "/%s", name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			return name;
		close(fd);
	}
	/* The entries stay allocated: this runs once. */
	return NULL;
}

#endif
