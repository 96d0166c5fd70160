/* SPDX-License-Identifier: GPL-2.0 */
/* What the parts of kdp-fuzz share: options, random numbers, the log of the last calls. */
#ifndef KDP_FUZZ_H
#define KDP_FUZZ_H

#include "touch.h"

struct options {
	unsigned long long ops;
	unsigned long long seed;
	unsigned int seconds;	/* 0: no limit but ops */
	unsigned int threads;
	unsigned int processes;
};

/* xorshift64*: the same seed gives the same run on every machine. */
struct rng {
	unsigned long long state;
};

static inline struct rng rng_new(unsigned long long seed)
{
	/* One step of splitmix64: seeds that are alike give runs that are not, and never state 0. */
	unsigned long long z = seed + 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	z ^= z >> 31;
	return (struct rng){ z ?: 1 };
}

static inline unsigned long long rng_next(struct rng *r)
{
	r->state ^= r->state >> 12;
	r->state ^= r->state << 25;
	r->state ^= r->state >> 27;
	return r->state * 0x2545f4914f6cdd1dULL;
}

/* Below n. */
static inline unsigned long long pick(struct rng *r, unsigned long long n)
{
	return (rng_next(r) >> 11) % n;
}

static inline bool chance(struct rng *r, unsigned int percent)
{
	return pick(r, 100) < percent;
}

/* A number that is likely to hurt. */
static inline unsigned long long nasty(struct rng *r)
{
	static const unsigned long long some[] = {
		0, 1, 2, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 1ULL << 31, 1ULL << 32,
		(1ULL << 36) - 1, 1ULL << 36, (1ULL << 36) + 1, 1ULL << 40, 1ULL << 51, 1ULL << 52,
		(1ULL << 52) + 1, KDP_BITMAP_OFFSET, 1ULL << 63, ~0ULL - 4095, ~0ULL - 1, ~0ULL,
	};

	if (chance(r, 20))
		return rng_next(r);
	return some[pick(r, ARRAY_SIZE(some))];
}

/* One call as the log has it. */
struct op {
	const char *name;
	unsigned long long arg[5];
	long result;
};

#define LOG_OPS	40

struct op_log {
	struct op ops[LOG_OPS];
	unsigned long long count;
};

static inline void log_op(struct op_log *log, const char *name, unsigned long long a,
			  unsigned long long b, unsigned long long c, unsigned long long d,
			  unsigned long long e)
{
	log->ops[log->count++ % LOG_OPS] = (struct op){ name, { a, b, c, d, e }, -1 };
}

static inline long log_result(struct op_log *log, long result)
{
	log->ops[(log->count - 1) % LOG_OPS].result = result;
	return result;
}

/* The last ops, as diagnostics of a TAP stream. */
static inline void log_print(const struct op_log *log)
{
	unsigned long long i = log->count > LOG_OPS ? log->count - LOG_OPS : 0;

	for (; i < log->count; i++) {
		const struct op *op = &log->ops[i % LOG_OPS];

		printf("#   %llu: %s(%#llx, %#llx, %#llx, %#llx, %#llx) = %ld\n", i, op->name,
		       op->arg[0], op->arg[1], op->arg[2], op->arg[3], op->arg[4], op->result);
	}
}

/* Both return whether all went as the ABI says; what did not is printed as diagnostics. */
bool fuzz_sequential(const struct options *opt);
bool fuzz_concurrent(const struct options *opt);

#endif
