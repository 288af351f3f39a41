/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_gate.h"
#include "facts.h"

struct probe_leaf probe_cpuid(uint32_t leaf)
{
    struct cpuid_registers found = cpuid(leaf, 0);

    return (struct probe_leaf){ leaf, 0, found.eax, found.ebx, found.ecx, found.edx };
}
