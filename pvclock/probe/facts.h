/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What a guest is told about its clocks: CPUID's leaves, and the pvclock records that it can see.
 */
#ifndef PVCLOCK_PROBE_FACTS_H
#define PVCLOCK_PROBE_FACTS_H

#include <stdbool.h>
#include <stdint.h>

#include "../include/pvclock_abi.h"

enum { PROBE_LEAVES_MAX = 48 };

struct probe_leaf {
    uint32_t leaf, subleaf, eax, ebx, ecx, edx;
};

/* A leaf's subleaf 0.  Each form has its own: CPUID is not the same in every ring of every host. */
struct probe_leaf probe_cpuid(uint32_t leaf);

/* Read the leaves that say something about time or the hypervisor (0, 1, 7, 0x15, 0x16, 0x80000000 and ...0007, each
 * hypervisor's signature leaf from 0x40000000 in steps of 0x100, and what follows it as far as it says); the count. */
unsigned probe_leaves(struct probe_leaf leaves[PROBE_LEAVES_MAX]);

/* Whether a hypervisor's first leaf is KVM's. */
bool probe_is_kvm(const struct probe_leaf *signature);

/* One pvclock record as seen now, and how often of `looks` its GUEST_STOPPED flag was set. */
struct probe_page {
    unsigned cpu;
    uint32_t version, mul;
    int32_t shift;
    uint32_t flags;
    unsigned looks, stopped_looks;
};

/* Look at a CPU's record once more, between two changes of it.  `page` begins zeroed, with its `cpu` set.  False, and
 * no look, where the record does not stand still for as long as a host takes to write it. */
bool probe_look(struct probe_page *page, const volatile struct pvclock_vcpu_time_info *record);

#endif
