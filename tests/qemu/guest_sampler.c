/* SPDX-License-Identifier: Apache-2.0
 *
 * The init of a stock Linux guest for tests/qemu/linux_guest.py: on each CPU in SAMPLE_ON ("0,1"; all by default) it
 * reads TSC, CLOCK_MONOTONIC and TSC again, without end, and says what no clock may do.  All else stays idle.
 *
 * Lines to port 0xe9, numbers in decimal, TSC in ticks and clocks in ns:
 *
 *   clocksource NAME                           the guest's; its own choice
 *   cpus N                                     online
 *   pages GPA                                  where it keeps the array of its kvmclock pages
 *   sampling CPU
 *   alive CPU TSC CLOCK TSC TRIPLES            the newest triple, and how many there were: 4 times a second
 *   gap CPU TSC CLOCK TSC TSC CLOCK TSC        two triples in succession, of which the clock went on unlike the TSC
 *   back CPU CLOCK TSC CLOCK TSC               what a read that had ended, on whatever CPU, gave, and this triple
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "../guest_triple.h"

#define PORT 0xe9
#define PAGES " hv_clock_boot\n"
#define CLOCKSOURCE "/sys/devices/system/clocksource/clocksource0/current_clocksource"
#define CALIBRATION_NS UINT64_C(100000000)
#define SLACK_NS 2000.0
#define SLACK_RATE (1.0 / 4096)

static double ns_per_tick;
static uint64_t widest_ticks; /* of a triple that nothing interrupted */
static atomic_uint_fast64_t highest_ns;

/* ---- What is told. ---- */

static int port; /* /dev/port: the kernel's own access, for QEMU's emulated CPUs may refuse one from user space */
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 1, 2))) static void tell(const char *format, ...)
{
	char line[256];
	va_list values;

	va_start(values, format);
	int length = vsnprintf(line, sizeof(line), format, values);
	va_end(values);
	pthread_mutex_lock(&writing);
	for (int i = 0; i < length; i++)
		if (pwrite(port, &line[i], 1, PORT) != 1)
			_exit(1);
	pthread_mutex_unlock(&writing);
}

static _Noreturn void fail(const char *what)
{
	tell("failed %s: %m\n", what);
	for (;;)
		pause();
}

/* ---- Triples. ---- */

static int by_width(const void *one, const void *other)
{
	const struct triple *a = one, *b = other;
	uint64_t width = a->after - a->before, other_width = b->after - b->before;

	return width < other_width ? -1 : width > other_width;
}

/* The narrowest of many, and how wide one is that nothing interrupts. */
static struct triple take_narrow(void)
{
	static struct triple triples[255];

	for (size_t i = 0; i < 255; i++)
		triples[i] = take(CLOCK_MONOTONIC);
	qsort(triples, 255, sizeof(*triples), by_width);
	widest_ticks = 4 * (triples[127].after - triples[127].before);
	return triples[0];
}

/* The clock's rate, well enough to see a step. */
static void calibrate(void)
{
	struct triple first = take_narrow(), last = first;

	while (last.ns - first.ns < CALIBRATION_NS)
		last = take_narrow();
	ns_per_tick = (double)(last.ns - first.ns) / (double)(last.before - first.before);
}

static int is_gap(const struct triple *old, const struct triple *new)
{
	double ns = (double)(new->before - old->before) * ns_per_tick;
	double width_ns = 2.0 * (double)widest_ticks * ns_per_tick;
	double off_ns = (double)(int64_t)(new->ns - old->ns) - ns;

	return (off_ns < 0 ? -off_ns : off_ns) > width_ns + SLACK_NS + ns * SLACK_RATE;
}

/* A reading against the highest before it; a step back is told once, for the next readings are held against this one. */
static void check_order(unsigned cpu, uint64_t highest, const struct triple *new)
{
	if (new->ns < highest) {
		tell("back %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", cpu, highest, new->before, new->ns,
		     new->after);
		atomic_store(&highest_ns, new->ns);
		return;
	}
	while (highest < new->ns && !atomic_compare_exchange_weak(&highest_ns, &highest, new->ns))
		;
}

static _Noreturn void *sample(void *argument)
{
	unsigned cpu = (unsigned)(uintptr_t)argument;
	uint64_t triples = 0, told_ns = 0;
	struct triple old = { 0, 0, 0 };

	tell("sampling %u\n", cpu);
	for (;;) {
		uint64_t highest = atomic_load(&highest_ns);
		struct triple new = take(CLOCK_MONOTONIC);

		check_order(cpu, highest, &new);
		if (new.after - new.before > widest_ticks)
			continue; /* interrupted: says too little of where the TSC was */
		if (triples++ && is_gap(&old, &new))
			tell("gap %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", cpu,
			     old.before, old.ns, old.after, new.before, new.ns, new.after);
		if (new.ns - told_ns > 250000000) {
			tell("alive %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", cpu, new.before, new.ns,
			     new.after, triples);
			told_ns = new.ns;
		}
		old = new;
	}
}

/* ---- What the kernel says of itself. ---- */

static void tell_clocksource(void)
{
	char name[64] = "";
	FILE *file = fopen(CLOCKSOURCE, "r");

	if (!file || !fgets(name, sizeof(name), file))
		fail(CLOCKSOURCE);
	tell("clocksource %s", name);
	fclose(file);
}

static uint64_t address_of_pages(void)
{
	char line[256];
	uint64_t address = 0;
	FILE *file = fopen("/proc/kallsyms", "r");

	if (!file)
		fail("kallsyms");
	while (!address && fgets(line, sizeof(line), file)) {
		const char *name = strrchr(line, ' ');

		if (name && strcmp(name, PAGES) == 0)
			address = strtoull(line, NULL, 16);
	}
	fclose(file);
	return address;
}

static uint64_t physical(uint64_t address)
{
	Elf64_Ehdr header;
	Elf64_Phdr part;
	FILE *file = fopen("/proc/kcore", "r");
	uint64_t found = 0;

	if (!file || fread(&header, sizeof(header), 1, file) != 1 || fseek(file, (long)header.e_phoff, SEEK_SET))
		fail("kcore");
	for (int i = 0; i < header.e_phnum && fread(&part, sizeof(part), 1, file) == 1; i++)
		if (part.p_type == PT_LOAD && address - part.p_vaddr < part.p_memsz)
			found = part.p_paddr + (address - part.p_vaddr);
	fclose(file);
	return found;
}

static void mount_on(const char *folder, const char *kind)
{
	mkdir(folder, 0755);
	if (mount(kind, folder, kind, 0, NULL))
		fail(folder);
}

/* ---- Threads, each on a CPU of its own. ---- */

static void start_on(unsigned cpu)
{
	pthread_attr_t attributes;
	pthread_t thread;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	pthread_attr_init(&attributes);
	pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	if (pthread_create(&thread, &attributes, sample, (void *)(uintptr_t)cpu))
		fail("pthread_create");
}

int main(void)
{
	const char *wanted = getenv("SAMPLE_ON");
	unsigned cpus = (unsigned)sysconf(_SC_NPROCESSORS_ONLN);

	if (mknod("/dev/port", S_IFCHR | 0600, makedev(1, 4)) || (port = open("/dev/port", O_WRONLY)) < 0)
		return 1;
	mount_on("/proc", "proc");
	mount_on("/sys", "sysfs");
	tell_clocksource();
	tell("cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	tell("pages %" PRIu64 "\n", physical(address_of_pages()));
	calibrate();
	for (unsigned cpu = 0; cpu < cpus && cpu < 10; cpu++)
		if (!wanted || strchr(wanted, (int)('0' + cpu)))
			start_on(cpu);
	for (;;)
		pause();
}
