/* SPDX-License-Identifier: GPL-2.0 */
/* The ABI as bindgen reads it: ioctl numbers are macros that it cannot evaluate otherwise. */
#include <uapi/linux/kvm_demand_paging.h>

enum kdp_cmd {
	KDP_CMD_INFO = KDP_INFO,
	KDP_CMD_MEMSLOT_CREATE = KDP_MEMSLOT_CREATE,
	KDP_CMD_MEMSLOT_REMOVE = KDP_MEMSLOT_REMOVE,
	KDP_CMD_MEMSLOT_GET = KDP_MEMSLOT_GET,
	KDP_CMD_PAGING = KDP_PAGING,
	KDP_CMD_MARK = KDP_MARK,
	KDP_CMD_VCPU_EXITS = KDP_VCPU_EXITS,
	KDP_CMD_COLLAPSE = KDP_COLLAPSE,
	KDP_CMD_SOURCE = KDP_SOURCE,
};
