// SPDX-License-Identifier: GPL-2.0
/*
 * A QEMU plugin: how many instructions the VM executed, by address, between two marks in the code that it runs.
 *
 * The mark is `nopl disp32(%rax)` with the displacement "KDP1" (begin) or "KDP0" (end): nothing to a processor,
 * unlikely in other code. Guests of kdp-vmm have them around what is measured.
 *
 * Counts go to the file of the option out=, as "ADDRESS COUNT CODE DATA" for each translated block that ran: CODE and
 * DATA are how often the block was the first to execute, or to access, a page of memory since the VM's own guest ran
 * last. Emulation, like a processor without tags in its TLB, forgets all translations when a guest is entered or left,
 * and looking them up again is most of the time that a fault takes there.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin-api.h"

__attribute__((visibility("default"))) int qemu_plugin_version = API_VERSION;

struct block {
	struct block *next;
	uint64_t address;
	uint64_t instructions;
	uint64_t executed;
	uint64_t code_pages;
	uint64_t data_pages;
};

/* Guests of kdp-vmm run below 4 GiB, all else above. */
#define IN_GUEST(address) ((address) < 1ull << 32)

/* Pages that were touched in this epoch, by their hash; a few that collide count too often. */
#define SLOTS (1 << 16)

static struct {
	uint64_t page;
	uint64_t epoch;
} seen[SLOTS];
static uint64_t epoch = 1;

static bool is_new(uint64_t address)
{
	uint64_t page = address >> 12;
	size_t slot = (page * 0x9e3779b97f4a7c15ull) >> 48;

	if (seen[slot].page == page && seen[slot].epoch == epoch)
		return false;
	seen[slot].page = page;
	seen[slot].epoch = epoch;
	return true;
}

/* With -icount the VM has one CPU and everything here runs on one thread. */
static struct block *blocks;
static bool counting;
static const char *out;

static void begin(unsigned int vcpu, void *data)
{
	counting = true;
}

static void end(unsigned int vcpu, void *data)
{
	counting = false;
}

static void execute(unsigned int vcpu, void *data)
{
	struct block *block = data;

	if (!counting)
		return;
	block->executed += block->instructions;
	if (IN_GUEST(block->address))
		epoch++;
	else
		block->code_pages += is_new(block->address);
}

static void access(unsigned int vcpu, uint32_t info, uint64_t address, void *data)
{
	struct block *block = data;

	if (counting && !IN_GUEST(block->address))
		block->data_pages += is_new(address ^ 1ull << 63);
}

static void look_for_mark(struct qemu_plugin_insn *insn)
{
	static const unsigned char mark[] = { 0x0f, 0x1f, 0x80, 'K', 'D', 'P' };
	unsigned char bytes[sizeof(mark) + 1];

	if (qemu_plugin_insn_size(insn) != sizeof(bytes) ||
	    qemu_plugin_insn_data(insn, bytes, sizeof(bytes)) != sizeof(bytes) ||
	    memcmp(bytes, mark, sizeof(mark)))
		return;
	if (bytes[sizeof(mark)] == '1')
		qemu_plugin_register_vcpu_insn_exec_cb(insn, begin, 0, NULL);
	if (bytes[sizeof(mark)] == '0')
		qemu_plugin_register_vcpu_insn_exec_cb(insn, end, 0, NULL);
}

static void translate(uint64_t id, struct qemu_plugin_tb *tb)
{
	struct block *block = malloc(sizeof(*block));
	size_t i, n = qemu_plugin_tb_n_insns(tb);

	if (!block)
		abort();
	/* The same address again, if other code is there now: the report adds them up. */
	*block = (struct block){ .next = blocks, .address = qemu_plugin_tb_vaddr(tb), .instructions = n };
	blocks = block;
	qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, 0, block);
	for (i = 0; i < n; i++)
		look_for_mark(qemu_plugin_tb_get_insn(tb, i));
	for (i = 0; i < n; i++)
		qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(tb, i), access, 0, READ_AND_WRITE, block);
}

static void write_out(uint64_t id, void *data)
{
	FILE *file = fopen(out, "w");

	if (!file) {
		perror(out);
		return;
	}
	for (const struct block *block = blocks; block; block = block->next)
		if (block->executed)
			fprintf(file, "%llx %llu %llu %llu\n", (unsigned long long)block->address,
				(unsigned long long)block->executed, (unsigned long long)block->code_pages,
				(unsigned long long)block->data_pages);
	fclose(file);
}

__attribute__((visibility("default")))
int qemu_plugin_install(uint64_t id, const struct qemu_info_t *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		if (!strncmp(argv[i], "out=", 4))
			out = argv[i] + 4;
	if (!out) {
		fprintf(stderr, "insns: say out=FILE\n");
		return -1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
	qemu_plugin_register_atexit_cb(id, write_out, NULL);
	return 0;
}
