/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include <cpuid.h>

#include "facts.h"

struct probe_leaf probe_cpuid(uint32_t leaf)
{
    struct probe_leaf found = {.leaf = leaf};

    __cpuid_count(leaf, 0, found.eax, found.ebx, found.ecx, found.edx);
    return found;
}
