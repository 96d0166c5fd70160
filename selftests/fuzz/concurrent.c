// SPDX-License-Identifier: GPL-2.0
/* The concurrent mode: starts processes and threads, serves their faults, kills one now and then. */
#include <dirent.h>
#include <stdarg.h>

#include "concurrent.h"

void concurrent_fail(struct shared *sh, const struct op_log *log, const char *fmt, ...)
{
	va_list args;

	if (atomic_exchange(&sh->failed, 1))
		return;
	va_start(args, fmt);
	vsnprintf(sh->message, sizeof(sh->message), fmt, args);
	va_end(args);
	printf("# %s\n# the last calls of that thread:\n", sh->message);
	log_print(log);
	sh->stop = 1;
}

static bool setup_checked(struct shared *sh, int i)
{
	struct checked *c = &sh->checked[i];
	struct kdp_memslot_create a = KDP_ARG(kdp_memslot_create, .slot_id = i,
		.base_gfn = (__u64)i << 12, .flags = KDP_MEMSLOT_PAGING);
	bool huge = i == 2 && hugetlb_reserve(1);

	*c = (struct checked){ .vm = i % NR_VMS, .id = i, .pages = huge ? 512 : 64, .zeros = i == 1 };
	c->memfd = memfd_sealed(huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0, c->pages, F_SEAL_SHRINK);
	a.memfd = c->memfd;
	a.nr_pages = c->pages;
	if (c->memfd < 0 || kdp_create(sh->vm[c->vm], &a))
		return false;
	c->alias = mmap(NULL, c->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, c->memfd, 0);
	c->guest = mmap(NULL, c->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a.fd, 0);
	if (!huge)
		c->own = mmap(NULL, c->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, a.fd, 0);
	c->bitmap = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a.fd, KDP_BITMAP_OFFSET);
	return c->alias != MAP_FAILED && c->guest != MAP_FAILED && c->own != MAP_FAILED &&
	       (void *)c->bitmap != MAP_FAILED;
}

static struct shared *setup(const struct options *opt)
{
	struct shared *sh = mmap(NULL, sizeof(*sh), PROT_READ | PROT_WRITE,
				 MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (sh == MAP_FAILED)
		return NULL;
	sh->opt = *opt;
	kdp_ioctls = &sh->ioctls;
	for (int i = 0; i < NR_VMS; i++) {
		sh->vm[i] = open(KDP_DEVICE_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (sh->vm[i] < 0)
			return NULL;
	}
	for (int i = 0; i < 3; i++)
		sh->chaos_memfd[i] = memfd_sealed(0, 160, i == 2 ? 0 : F_SEAL_SHRINK);
	for (int i = 0; i < NR_CHECKED; i++)
		if (!setup_checked(sh, i))
			return NULL;
	touch_init();
	return sh;
}

static void *task_main(void *arg)
{
	struct task *t = arg;

	while (!t->sh->stop) {
		if (t->sh->ops++ >= t->sh->opt.ops)
			t->sh->stop = 1;
		if (chance(&t->r, 50))
			checked_touch(t);
		else
			chaos_op(t);
	}
	return NULL;
}

/* A process of so many threads. */
static void process_main(struct shared *sh, unsigned int number, unsigned long long life)
{
	static struct task tasks[64];
	static pthread_t threads[64];
	unsigned int made;

	for (made = 0; made < sh->opt.threads; made++) {
		struct task *t = &tasks[made];

		t->sh = sh;
		t->index = number * 64 + made;
		t->r = rng_new(sh->opt.seed + 1000 * life + t->index);
		if (pthread_create(&threads[made], NULL, task_main, t))
			break;
	}
	/* Pages of VMs that only this process has may keep threads waiting: our parent ends it. */
	for (;;)
		pause();
}

static pid_t spawn(struct shared *sh, unsigned int number, unsigned long long life)
{
	pid_t pid = fork();

	if (pid == 0)
		process_main(sh, number, life);
	return pid;
}

/* Resolve what is waited for; checked memslots are served by their owners. */
static void serve(struct shared *sh)
{
	struct pollfd pfd[NR_VMS];
	struct kdp_event ev[8];

	for (int i = 0; i < NR_VMS; i++)
		pfd[i] = (struct pollfd){ .fd = sh->vm[i], .events = POLLIN };
	poll(pfd, NR_VMS, 2);
	for (int i = 0; i < NR_VMS; i++) {
		ssize_t got = read(sh->vm[i], ev, sizeof(ev));

		for (ssize_t e = 0; e < got / (ssize_t)sizeof(ev[0]); e++)
			if (ev[e].slot_id >= CHAOS_ID)
				kdp_mark(sh->vm[i], ev[e].slot_id, KDP_STATE_PRESENT, ev[e].page, 1);
	}
}

/* Where in the kernel the threads of a process are. */
static void print_stacks(pid_t pid)
{
	char path[300], line[256];
	struct dirent *task;
	DIR *dir;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && (task = readdir(dir))) {
		if (task->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/proc/%d/task/%s/stack", pid, task->d_name);
		f = fopen(path, "re");
		printf("# thread %s of process %d:\n", task->d_name, pid);
		while (f && fgets(line, sizeof(line), f))
			printf("#   %s", line);
		if (f)
			fclose(f);
	}
	if (dir)
		closedir(dir);
}

/* When the owners are done all checked pages are present: nobody may wait for one. */
static void check_nobody_waits(struct shared *sh, const struct op_log *log, const pid_t *pids)
{
	long long end = now_ms() + PATIENCE_MS;
	unsigned int n = sh->opt.processes * 64;

	for (unsigned int i = 0; i < n; i++)
		while (sh->touching[i] && now_ms() < end)
			usleep(1000);
	for (unsigned int i = 0; i < n; i++)
		if (sh->touching[i] && !sh->failed) {
			concurrent_fail(sh, log, "thread %u of process %u does not get a page that is present",
					i % 64, i / 64);
			print_stacks(pids[i / 64]);
		}
}

bool fuzz_concurrent(const struct options *opt)
{
	static struct owner owners[NR_CHECKED];
	struct op_log log = { 0 };
	struct shared *sh = setup(opt);
	long long end, next_kill, last_progress;
	unsigned long long seen = 0, life = 0;
	pid_t pids[64];

	if (!sh) {
		printf("# the memslots could not be made: %s\n", strerror(errno));
		return false;
	}
	for (unsigned int i = 0; i < opt->processes; i++)
		pids[i] = spawn(sh, i, 0);
	for (int i = 0; i < NR_CHECKED; i++) {
		owners[i] = (struct owner){ .sh = sh, .c = &sh->checked[i],
					    .r = rng_new(opt->seed + 7777 + i) };
		if (pthread_create(&owners[i].thread, NULL, owner_main, &owners[i]))
			return false;
	}
	end = now_ms() + opt->seconds * 1000LL;
	next_kill = now_ms() + 200;
	last_progress = now_ms();
	while (!sh->stop) {
		serve(sh);
		if (sh->ops != seen) {
			seen = sh->ops;
			last_progress = now_ms();
		}
		if (now_ms() - last_progress > 3 * PATIENCE_MS)
			concurrent_fail(sh, &log, "no progress for %d s", 3 * PATIENCE_MS / 1000);
		if (opt->seconds && now_ms() > end)
			sh->stop = 1;
		if (opt->processes > 1 && now_ms() > next_kill) {
			/* The last process dies a violent death, and another one takes its place. */
			unsigned int i = opt->processes - 1;

			kill(pids[i], SIGKILL);
			waitpid(pids[i], NULL, 0);
			memset((void *)&sh->touching[i * 64], 0, 64);
			pids[i] = spawn(sh, i, ++life);
			next_kill = now_ms() + 200;
		}
	}
	for (int i = 0; i < NR_CHECKED; i++)
		pthread_join(owners[i].thread, NULL);
	if (!sh->failed)
		check_nobody_waits(sh, &log, pids);
	for (unsigned int i = 0; i < opt->processes; i++) {
		kill(pids[i], SIGKILL);
		waitpid(pids[i], NULL, 0);
	}
	printf("# %llu ops, %llu ioctls, %llu processes killed\n", (unsigned long long)sh->ops,
	       (unsigned long long)sh->ioctls, life);
	return !sh->failed;
}
