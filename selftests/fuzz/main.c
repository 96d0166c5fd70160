// SPDX-License-Identifier: GPL-2.0
/*
 * kdp-fuzz: random calls, checked against a model of the page states.
 *
 *   kdp-fuzz [--ops N] [--seed S] [--seconds S] [--threads N] [--processes N]
 *   kdp-fuzz --list | NAME...      as a selftest
 *
 * One thread of one process is checked exactly: each result, each byte, each
 * bit, each event. The same seed gives the same calls. Several threads or
 * processes are checked by what must hold whatever the order.
 */
#include <getopt.h>
#include <sys/wait.h>

#include "fuzz.h"

static unsigned long long to_number(const char *option, const char *text)
{
	unsigned long long n;
	char *end;

	errno = 0;
	n = strtoull(text, &end, 0);
	if (errno || !*text || *end || *text == '-') {
		fprintf(stderr, "kdp-fuzz: %s: '%s' is not a number\n", option, text);
		exit(2);
	}
	return n;
}

static bool run(const struct options *opt)
{
	bool good;

	printf("# seed %llu, %llu ops, %u process%s of %u thread%s\n", opt->seed, opt->ops,
	       opt->processes, opt->processes == 1 ? "" : "es", opt->threads,
	       opt->threads == 1 ? "" : "s");
	if (opt->threads == 1 && opt->processes == 1)
		good = fuzz_sequential(opt);
	else
		good = fuzz_concurrent(opt);
	if (!good)
		printf("# again: kdp-fuzz --seed %llu --ops %llu --threads %u --processes %u\n",
		       opt->seed, opt->ops, opt->threads, opt->processes);
	return good;
}

static const struct {
	const char *name;
	unsigned int threads, processes;
	unsigned long long ops;
} tests[] = {
	{ "fuzz-sequential-model", 1, 1, 20000 },
	{ "fuzz-concurrent", 3, 3, 20000 },
};

static int find(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(tests); i++)
		if (!strcmp(name, tests[i].name))
			return i;
	fprintf(stderr, "kdp-fuzz: there is no test '%s'; --list shows them, options begin with --\n",
		name);
	exit(2);
}

/* Each in a process of its own: what one leaves behind is gone for the next. */
static int run_tests(int argc, char **argv)
{
	const char *ops = getenv("KDP_FUZZ_OPS"), *seed = getenv("KDP_FUZZ_SEED");
	int failed = 0;

	for (int i = 0; i < argc; i++)
		find(argv[i]);
	printf("TAP version 13\n1..%d\n", argc);
	for (int i = 0; i < argc; i++) {
		int t = find(argv[i]), status = -1;
		struct options opt = {
			.ops = ops ? to_number("KDP_FUZZ_OPS", ops) : tests[t].ops,
			.seed = seed ? to_number("KDP_FUZZ_SEED", seed) : 1,
			.threads = tests[t].threads,
			.processes = tests[t].processes,
		};
		pid_t child;

		child = fork();
		if (!child)
			exit(!run(&opt));
		if (child < 0 || waitpid(child, &status, 0) != child)
			status = -1;
		if (status > 0 && WIFSIGNALED(status))
			printf("# it was ended by signal %d\n", WTERMSIG(status));
		printf("%sok %d %s\n", status ? "not " : "", i + 1, argv[i]);
		failed += !!status;
	}
	return failed ? 1 : 0;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "ops", required_argument, NULL, 'o' },
		{ "seed", required_argument, NULL, 's' },
		{ "seconds", required_argument, NULL, 't' },
		{ "threads", required_argument, NULL, 'n' },
		{ "processes", required_argument, NULL, 'p' },
		{ "list", no_argument, NULL, 'l' },
		{ NULL, 0, NULL, 0 },
	};
	struct options opt = { .ops = 100000, .seed = 0, .threads = 1, .processes = 1 };
	bool seeded = false;
	int c;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (c) {
		case 'o':
			opt.ops = to_number("--ops", optarg);
			break;
		case 's':
			opt.seed = to_number("--seed", optarg);
			seeded = true;
			break;
		case 't':
			opt.seconds = to_number("--seconds", optarg);
			opt.ops = ~0ULL;
			break;
		case 'n':
			opt.threads = to_number("--threads", optarg);
			break;
		case 'p':
			opt.processes = to_number("--processes", optarg);
			break;
		case 'l':
			for (size_t i = 0; i < ARRAY_SIZE(tests); i++)
				puts(tests[i].name);
			return 0;
		default:
			return 2;
		}
	if (opt.threads < 1 || opt.threads > 64 || opt.processes < 1 || opt.processes > 64) {
		fprintf(stderr, "kdp-fuzz: --threads and --processes go from 1 to 64\n");
		return 2;
	}
	if (optind < argc)
		return run_tests(argc - optind, argv + optind);
	if (!seeded)
		opt.seed = now_ms();
	return run(&opt) ? 0 : 1;
}
