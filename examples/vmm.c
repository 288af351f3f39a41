/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* A VMM that serves its guest's clock itself, with pvclock's headers and libc alone; docs/c.md goes through it.
 *
 *   cd examples; cc -std=c11 -O2 -pthread -I"$(python3 -c 'import pvclock; print(pvclock.get_include())')" vmm.c -o vmm && ./vmm
 *
 * The guest reads its clock while the VMM changes the rate of guest time, and each reading is compared with the exact
 * timeline.  Exit status: 0; 1 if a reading was wrong; 2 if this host lacks what it takes.  With -DNAIVE the rate is
 * changed in the order that suggests itself, which is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "pvclock_publish.h"
#include "pvclock_records.h"
#include "tiny_vm.h"

#ifndef VCPUS
#define VCPUS 1 /* up to 16: their logs share RAM's upper half */
#endif
_Static_assert(VCPUS >= 1 && LOGS + VCPUS * LOG_READINGS * sizeof(struct reading) <= RAM_BYTES, "VCPUS: 1 to 16");
#define CHANGES 1000 /* of the rate */
#define KVM_FEATURES 0x0100000b /* CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE */

enum { MSR_WALL_CLOCK = 0x11, MSR_SYSTEM_TIME, MSR_WALL_CLOCK_NEW = 0x4b564d00, MSR_SYSTEM_TIME_NEW };

/* The VM's clock.  One thread at a time may publish: every use of the clock holds the lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t tsc_hz;
static struct pvclock_counter counter;
static struct pvclock_line line;            /* guest time, exactly, from the last change of its rate on */
static struct pvclock_anchor_params params; /* how pages show its rate */
static struct pvclock_anchor anchor;        /* the line published last */

static uint8_t *ram;
static uint64_t wall_clock_msr;
static struct vcpu {
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	uint64_t system_time_msr;
	void *page; /* NULL: it has none */
	size_t line, readings, lines_read, backward, beyond_bound; /* what check_reading() found; line: in lines[] */
	uint64_t last_ns;
	double least_ns, most_ns; /* of a reading, minus the timeline */
} vcpus[VCPUS];

static struct pvclock_line lines[CHANGES + 1]; /* that guest time was on, for check_reading() */
static size_t last_line;

/* Publish the line at the rate into all pages; returns the break point.
 * out: the vCPU that is out of the guest, so that the flags in its page can be written; NULL for none.
 */
static uint64_t publish(const struct vcpu *out)
{
	struct pvclock_target targets[VCPUS] = { { 0 } };
	size_t count = 0;
	uint64_t break_tsc;

	for (struct vcpu *vcpu = vcpus; vcpu < vcpus + VCPUS; vcpu++)
		if (vcpu->page)
			targets[count++] = (struct pvclock_target){
				.page = vcpu->page, .flags = PVCLOCK_TSC_STABLE_BIT, .in_guest = vcpu != out };
	if (pvclock_publish(targets, count, &line, &params, &counter, &anchor, &break_tsc) != 0)
		lack("TSC", "it went back");
	return break_tsc;
}

/* What pages show of ns/ticks: rounded down, for a page must not be faster than the timeline. */
static struct pvclock_anchor_params params_of(uint64_t ns, uint64_t ticks)
{
	struct pvclock_scale scale;

	if (pvclock_time_scale_of_rate(ns, ticks, 0, &scale) != 0)
		lack("TSC", "no page can show this rate");
	return pvclock_anchor_params_of(scale);
}

/* From the next break point on, guest_s of guest time pass in host_s of host time; the guest's clock does not step. */
static void change_rate(uint64_t guest_s, uint64_t host_s)
{
	uint64_t ns = guest_s * PVCLOCK_NS_PER_SEC, ticks = host_s * tsc_hz, break_tsc;

	pthread_mutex_lock(&lock);
	params = params_of(ns, ticks);
#ifdef NAIVE
	/* Wrong: the guest goes on along the old line until the break point, and this timeline does not. */
	break_tsc = pvclock_counter_read(&counter);
	line = pvclock_line_turn(pvclock_line_at(line, break_tsc), ns, ticks);
	publish(NULL);
#else
	/* The old line at the new rate; then the timeline turns where the guest has gone over to that rate. */
	break_tsc = publish(NULL);
	line = pvclock_line_turn(pvclock_line_at(line, break_tsc), ns, ticks);
#endif
	lines[++last_line] = line;
	pthread_mutex_unlock(&lock);
}

/* The guest says where its page is. */
static void register_page(struct vcpu *vcpu, uint64_t value)
{
	uint64_t gpa = value & ~UINT64_C(1);
	int has_page = value & 1 && gpa <= RAM_BYTES - sizeof(struct pvclock_vcpu_time_info);

	vcpu->system_time_msr = value;
	vcpu->page = has_page ? ram + gpa : NULL;
	publish(vcpu);
}

/* The guest asks for the time of day, UTC, at which its time was 0. */
static void write_wall_clock(uint64_t gpa)
{
	struct timespec now;
	uint64_t ns;

	wall_clock_msr = gpa;
	if (gpa > RAM_BYTES - sizeof(struct pvclock_wall_clock))
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	ns = (uint64_t)now.tv_sec * PVCLOCK_NS_PER_SEC + (uint64_t)now.tv_nsec;
	ns -= pvclock_line_at(line, pvclock_counter_read(&counter)).ns;
	pvclock_publish_wall_clock(ram + gpa, (uint32_t)(ns / PVCLOCK_NS_PER_SEC), (uint32_t)(ns % PVCLOCK_NS_PER_SEC));
}

static void access_msr(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	int is_wall_clock = run->msr.index == MSR_WALL_CLOCK || run->msr.index == MSR_WALL_CLOCK_NEW;

	if (run->exit_reason == KVM_EXIT_X86_RDMSR)
		run->msr.data = is_wall_clock ? wall_clock_msr : vcpu->system_time_msr;
	else if (is_wall_clock)
		write_wall_clock(run->msr.data);
	else
		register_page(vcpu, run->msr.data);
	run->msr.error = 0; /* 1 is #GP */
}

/* A reading is within 2 ns, the ticks that the guest's right shift cuts (less than 1 ns), and 0.47 ppb of the page's
 * age of the timeline.
 */
static void check_reading(struct vcpu *vcpu, const struct reading *reading)
{
	size_t before = vcpu->line;
	struct pvclock_line exact;
	double error_ns, bound_ns;

	while (vcpu->line < last_line && lines[vcpu->line + 1].tsc <= reading->tsc)
		vcpu->line++;
	exact = pvclock_line_at(lines[vcpu->line], reading->tsc);
	error_ns = (double)(int64_t)(reading->ns - exact.ns) - (double)exact.rem / (double)exact.den;
	bound_ns = 3 + 0.47e-9 * (double)(exact.ns - lines[vcpu->line].ns);
	vcpu->beyond_bound += error_ns > bound_ns || error_ns < -bound_ns;
	vcpu->backward += reading->ns < vcpu->last_ns;
	vcpu->lines_read += vcpu->readings == 0 || vcpu->line != before;
	vcpu->least_ns = error_ns < vcpu->least_ns ? error_ns : vcpu->least_ns;
	vcpu->most_ns = error_ns > vcpu->most_ns ? error_ns : vcpu->most_ns;
	vcpu->last_ns = reading->ns;
	vcpu->readings++;
}

/* The guest's log is full.  Returns whether it has read enough: its clock after the last change. */
static int check_log(struct vcpu *vcpu)
{
	const struct reading *log = (void *)(ram + log_address(vcpu - vcpus));

	if (log[0].tsc < lines[0].tsc || log[LOG_READINGS - 1].tsc > pvclock_counter_read(&counter))
		lack("KVM_VCPU_TSC_OFFSET", "the guest's TSC is not the host's");
	for (size_t i = 0; i < LOG_READINGS; i++)
		check_reading(vcpu, &log[i]);
	return vcpu->line == CHANGES;
}

static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;

	for (int is_done = 0; !is_done;) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) != 0 && errno != EINTR)
			lack("KVM_RUN", strerror(errno));
		pthread_mutex_lock(&lock);
		if (vcpu->run->exit_reason == KVM_EXIT_IO)
			is_done = check_log(vcpu);
		else if (vcpu->run->exit_reason == KVM_EXIT_X86_RDMSR || vcpu->run->exit_reason == KVM_EXIT_X86_WRMSR)
			access_msr(vcpu);
		else if (vcpu->run->exit_reason != KVM_EXIT_INTR)
			lack("guest", "it found no clock, or crashed");
		pthread_mutex_unlock(&lock);
	}
	return NULL;
}

static void route_msrs(int vm)
{
	uint8_t none = 0; /* of these MSRs are the kernel's */
	uint32_t both = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
	struct kvm_enable_cap to_us = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_FILTER } };
	struct kvm_msr_filter filter = { .ranges = {
		{ .flags = both, .base = MSR_WALL_CLOCK, .nmsrs = 2, .bitmap = &none },
		{ .flags = both, .base = MSR_WALL_CLOCK_NEW, .nmsrs = 2, .bitmap = &none },
	} };

	CALL(vm, KVM_ENABLE_CAP, &to_us); /* first, for without it a filtered MSR is #GP */
	CALL(vm, KVM_X86_SET_MSR_FILTER, &filter);
}

/* Pages say STABLE: the host's kernel trusts its TSC.  Where it does not, KVM steers the guests' along its own time. */
static void require_trusted_tsc(void)
{
	char name[8] = "";
	FILE *file = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "r");

	if (!file || !fgets(name, sizeof name, file) || strcmp(name, "tsc\n") != 0)
		lack("TSC", "this host's kernel does not trust it");
	fclose(file);
}

int main(void)
{
	static const uint64_t RATES[][2] = { { 1, 2 }, { 1, 1 }, { 2, 1 }, { 1, 10 }, { 1000001, 1000000 }, { 1, 3 } };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, failed = 0;
	uint64_t offset = 0; /* of all vCPUs' TSCs from the host's; KVM's own would make them begin at 0 */
	struct kvm_device_attr tsc_offset = { 0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, (uintptr_t)&offset };

	if (kvm < 0)
		lack("/dev/kvm", strerror(errno));
	require_trusted_tsc();
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	route_msrs(vm);
	ram = make_ram(vm);
	for (struct vcpu *vcpu = vcpus; vcpu < vcpus + VCPUS; vcpu++) {
		vcpu->fd = CALL(vm, KVM_CREATE_VCPU, vcpu - vcpus);
		vcpu->run = map(vcpu->fd, CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
		set_cpuid(kvm, vcpu->fd, KVM_FEATURES);
		set_registers(vcpu->fd, vcpu - vcpus);
		CALL(vcpu->fd, KVM_SET_DEVICE_ATTR, &tsc_offset);
	}

	tsc_hz = 1000 * (uint64_t)CALL(vcpus[0].fd, KVM_GET_TSC_KHZ, 0);
	counter = pvclock_host_counter();
	line = (struct pvclock_line){ .tsc = pvclock_counter_read(&counter), .num = PVCLOCK_NS_PER_SEC, .den = tsc_hz };
	params = params_of(line.num, line.den);
	lines[0] = line;
	for (struct vcpu *vcpu = vcpus; vcpu < vcpus + VCPUS; vcpu++)
		if ((errno = pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu)) != 0)
			lack("pthread_create", strerror(errno));

	for (size_t i = 0; i < CHANGES; i++) {
		usleep(50); /* publish within 2 s of guest time, even if nothing changes */
		change_rate(RATES[i % 6][0], RATES[i % 6][1]);
	}
	for (struct vcpu *vcpu = vcpus; vcpu < vcpus + VCPUS; vcpu++) {
		pthread_join(vcpu->thread, NULL);
		printf("vCPU %td: %d rate changes, %zu readings on %zu lines, %zu backward, %zu beyond the bound, "
		       "%+.2f to %+.2f ns off\n", vcpu - vcpus, CHANGES, vcpu->readings, vcpu->lines_read,
		       vcpu->backward, vcpu->beyond_bound, vcpu->least_ns, vcpu->most_ns);
		failed |= vcpu->backward || vcpu->beyond_bound;
	}
	if (fflush(stdout) != 0)
		lack("standard output", strerror(errno));
	return failed;
}
