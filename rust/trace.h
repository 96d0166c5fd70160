/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvm_demand_paging

#if !defined(KDP_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define KDP_TRACE_H

#include <linux/tracepoint.h>

/* A page, or a block of 1 << order pages, was mapped. */
TRACE_EVENT(kdp_fault,
	TP_PROTO(u32 slot, u64 page, u32 access, u32 order),
	TP_ARGS(slot, page, access, order),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, page)
		__field(u32, access)
		__field(u32, order)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->page = page;
		__entry->access = access;
		__entry->order = order;
	),
	TP_printk("slot %u page 0x%llx access 0x%x order %u",
		  __entry->slot, __entry->page, __entry->access, __entry->order)
);

/* A vCPU's stage-2 fault ends in an exit. */
TRACE_EVENT(kdp_exit,
	TP_PROTO(u32 slot, u64 page, u64 gpa, u64 flags),
	TP_ARGS(slot, page, gpa, flags),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, page)
		__field(u64, gpa)
		__field(u64, flags)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->page = page;
		__entry->gpa = gpa;
		__entry->flags = flags;
	),
	TP_printk("slot %u page 0x%llx gpa 0x%llx flags 0x%llx",
		  __entry->slot, __entry->page, __entry->gpa, __entry->flags)
);

/* A thread begins to wait for a page. */
TRACE_EVENT(kdp_wait,
	TP_PROTO(u32 slot, u64 page, u32 access),
	TP_ARGS(slot, page, access),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, page)
		__field(u32, access)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->page = page;
		__entry->access = access;
	),
	TP_printk("slot %u page 0x%llx access 0x%x",
		  __entry->slot, __entry->page, __entry->access)
);

/* Pages were read from a source, ahead if there are several, or could not be. */
TRACE_EVENT(kdp_source,
	TP_PROTO(u32 slot, u64 first, u64 count, int error),
	TP_ARGS(slot, first, count, error),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, first)
		__field(u64, count)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->first = first;
		__entry->count = count;
		__entry->error = error;
	),
	TP_printk("slot %u first 0x%llx count %llu error %d",
		  __entry->slot, __entry->first, __entry->count,
		  __entry->error)
);

/* A range of whole blocks was mapped anew. */
TRACE_EVENT(kdp_collapse,
	TP_PROTO(u32 slot, u64 first, u64 count),
	TP_ARGS(slot, first, count),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, first)
		__field(u64, count)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->first = first;
		__entry->count = count;
	),
	TP_printk("slot %u first 0x%llx count %llu",
		  __entry->slot, __entry->first, __entry->count)
);

/* A range was marked present or zero. */
TRACE_EVENT(kdp_resolve,
	TP_PROTO(u32 slot, u64 first, u64 count, u64 changed, u64 woken),
	TP_ARGS(slot, first, count, changed, woken),
	TP_STRUCT__entry(
		__field(u32, slot)
		__field(u64, first)
		__field(u64, count)
		__field(u64, changed)
		__field(u64, woken)
	),
	TP_fast_assign(
		__entry->slot = slot;
		__entry->first = first;
		__entry->count = count;
		__entry->changed = changed;
		__entry->woken = woken;
	),
	TP_printk("slot %u first 0x%llx count %llu changed %llu woken %llu",
		  __entry->slot, __entry->first, __entry->count,
		  __entry->changed, __entry->woken)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
