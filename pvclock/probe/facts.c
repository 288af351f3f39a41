/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "facts.h"

static const uint32_t EXTENDED_BASE = 0x80000000;
static const uint32_t HYPERVISOR_BASE = 0x40000000, HYPERVISOR_LAST = 0x4000ff00; /* as far as Linux looks */

enum {
    HYPERVISOR_STEP = 0x100,
    FOLLOWING_MAX = 0x10, /* the frequency leaf, 0x40000010: what lies beyond says nothing of time */
    HYPERVISOR_BIT = 31,  /* of leaf 1's ECX */
    LOOK_TRIES = 1000
};

struct leaf_list {
    struct probe_leaf *leaves;
    unsigned count;
};

static void keep(struct leaf_list *list, struct probe_leaf leaf)
{
    if (list->count < PROBE_LEAVES_MAX)
        list->leaves[list->count++] = leaf;
}

static void keep_basic(struct leaf_list *list)
{
    static const uint32_t basic[] = {1, 7, 0x15, 0x16};
    struct probe_leaf first = probe_cpuid(0);

    keep(list, first);
    for (unsigned i = 0; i < sizeof(basic) / sizeof(*basic); i++)
        if (basic[i] <= first.eax)
            keep(list, probe_cpuid(basic[i]));
}

static void keep_extended(struct leaf_list *list)
{
    struct probe_leaf first = probe_cpuid(EXTENDED_BASE);

    keep(list, first);
    if (first.eax >= EXTENDED_BASE + 7)
        keep(list, probe_cpuid(EXTENDED_BASE + 7));
}

bool probe_is_kvm(const struct probe_leaf *signature)
{
    const uint32_t kvm[] = {0x4b4d564b, 0x564b4d56, 0x4d}; /* "KVMKVMKVM" */

    return signature->ebx == kvm[0] && signature->ecx == kvm[1] && signature->edx == kvm[2];
}

/* Old KVM says 0 for its last leaf, and means the first after the signature. */
static uint32_t last_of_hypervisor(const struct probe_leaf *signature)
{
    return signature->eax == 0 && probe_is_kvm(signature) ? signature->leaf + 1 : signature->eax;
}

/* A leaf that nobody answers may say what some other leaf does: what it names as the last must be of this block. */
static void keep_hypervisor(struct leaf_list *list, uint32_t base)
{
    struct probe_leaf signature = probe_cpuid(base);
    uint32_t last = last_of_hypervisor(&signature);

    if (last < base || last >= base + HYPERVISOR_STEP)
        return;
    keep(list, signature);
    for (uint32_t leaf = base + 1; leaf <= last && leaf <= base + FOLLOWING_MAX; leaf++)
        keep(list, probe_cpuid(leaf));
}

unsigned probe_leaves(struct probe_leaf leaves[PROBE_LEAVES_MAX])
{
    struct leaf_list list = {.leaves = leaves};

    keep_basic(&list);
    keep_extended(&list);
    if (probe_cpuid(1).ecx >> HYPERVISOR_BIT & 1)
        for (uint32_t base = HYPERVISOR_BASE; base <= HYPERVISOR_LAST; base += HYPERVISOR_STEP)
            keep_hypervisor(&list, base);
    return list.count;
}

/* The compiler keeps volatile reads in their order, and so does the CPU: loads pass no loads. */
static bool read_once(struct probe_page *page, const volatile struct pvclock_vcpu_time_info *record)
{
    page->version = record->version;
    page->mul = record->tsc_to_system_mul;
    page->shift = record->tsc_shift;
    page->flags = record->flags;
    return page->version % 2 == 0 && record->version == page->version;
}

bool probe_look(struct probe_page *page, const volatile struct pvclock_vcpu_time_info *record)
{
    for (unsigned try = 0; try < LOOK_TRIES; try++)
        if (read_once(page, record)) {
            page->looks++;
            page->stopped_looks += (page->flags & PVCLOCK_GUEST_STOPPED) != 0;
            return true;
        }
    return false;
}
