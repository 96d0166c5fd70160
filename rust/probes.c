// SPDX-License-Identifier: GPL-2.0
/*
 * The module registers probes by the name of a tracepoint, so the compiler does
 * not check their prototypes. This file checks them: it does not compile if the
 * kernel has changed a prototype.
 */
#include <linux/kvm_host.h>
#include <trace/events/kvm.h>
#include <trace/events/memory-failure.h>

#include "helpers.h"

/*
 * KVM's x86 tracepoints are in arch/x86/kvm/trace.h, which headers packages lack.
 * Kbuild looks for it in the kernel's source and where dkms/kernel-metadata puts it.
 */
#ifdef KDP_KVM_TRACE_H
#include KDP_KVM_TRACE_H
#else
#pragma message("no arch/x86/kvm/trace.h: the prototype of kvm_page_fault is not checked")
#endif

static void __maybe_unused check_prototypes(void)
{
#ifdef KDP_KVM_TRACE_H
	check_trace_callback_type_kvm_page_fault((kdp_kvm_page_fault_probe)NULL);
#endif
	check_trace_callback_type_kvm_userspace_exit((kdp_kvm_userspace_exit_probe)NULL);
	check_trace_callback_type_memory_failure_event((kdp_memory_failure_event_probe)NULL);
}
