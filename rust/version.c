// SPDX-License-Identifier: GPL-2.0
/*
 * The version that modinfo and /sys/module/kvm_demand_paging/version show. The
 * macro module! has no key for it.
 */
#include <linux/module.h>

MODULE_VERSION(KDP_VERSION);
