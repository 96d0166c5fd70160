// SPDX-License-Identifier: GPL-2.0
/*
 * For the test VM's kernel, where QEMU emulates its CPUs: ends interrupts that
 * were never handled.
 *
 * Now and then an emulated CPU acknowledges an interrupt and does not run its
 * handler. Its local APIC has it in service from then on and keeps back all
 * that are not of a higher priority. It is the timer's, mostly: the CPU sleeps
 * for ever, and the whole kernel waits for it. In the handler of an interrupt
 * of the highest priority class that has ended itself (call function), no other
 * one can be in service: what is, was lost, and is ended here.
 *
 * Each CPU looks after the next one, so one that is stuck is found by another.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpumask.h>
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/smp.h>
#include <asm/apic.h>

#define KDP_VECTORS	256

static void kdp_guard_look(void *unused)
{
	int word;

	for (word = KDP_VECTORS / 32 - 1; word >= 0; word--) {
		u32 in_service;

		while ((in_service = native_apic_mem_read(APIC_ISR + word * 0x10))) {
			/* The highest is ended first. */
			native_apic_mem_eoi();
			pr_info("the emulator has lost an interrupt of CPU %d, vector %d: it was ended\n",
				smp_processor_id(), word * 32 + fls(in_service) - 1);
		}
	}
}

static DEFINE_PER_CPU(call_single_data_t, kdp_guard_call) =
	CSD_INIT(kdp_guard_look, NULL);

static int kdp_guard_run(void *unused)
{
	ktime_t second = ms_to_ktime(MSEC_PER_SEC);

	/* Not by jiffies: they stand still where the CPU that counts them does. */
	while (!kthread_should_stop()) {
		int next = cpumask_next_wrap(raw_smp_processor_id(), cpu_online_mask);

		/* If it is still on its way there is no need for another. */
		smp_call_function_single_async(next, &per_cpu(kdp_guard_call, next));
		set_current_state(TASK_IDLE);
		schedule_hrtimeout(&second, HRTIMER_MODE_REL);
	}
	return 0;
}

/* It stays: there is no exit. */
static int __init kdp_guard_init(void)
{
	int cpu;

	if (num_online_cpus() < 2 || x2apic_enabled())
		return -ENODEV;
	for_each_online_cpu(cpu) {
		struct task_struct *task;

		task = kthread_run_on_cpu(kdp_guard_run, NULL, cpu, "kdp_guard/%u");
		if (IS_ERR(task))
			pr_warn("CPU %d looks after nobody: %ld\n", cpu, PTR_ERR(task));
	}
	return 0;
}
module_init(kdp_guard_init);

MODULE_DESCRIPTION("Ends interrupts that QEMU's emulation of x86 has lost");
MODULE_LICENSE("GPL");
