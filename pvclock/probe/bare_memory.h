/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#ifndef PVCLOCK_PROBE_BARE_MEMORY_H
#define PVCLOCK_PROBE_BARE_MEMORY_H

#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memmove(void *to, const void *from, size_t bytes);
void *memset(void *to, int byte, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);

#endif
