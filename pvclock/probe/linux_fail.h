/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * How the probe for Linux ends where it cannot measure: one line on standard error, and status 2.
 */
#ifndef PVCLOCK_PROBE_LINUX_FAIL_H
#define PVCLOCK_PROBE_LINUX_FAIL_H

enum { EXIT_CANNOT = 2 };

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
