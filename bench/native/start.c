/* SPDX-License-Identifier: Apache-2.0
 *
 * The ioctls from /dev/kvm to a guest's first exit that a Machine makes, and nothing else, each step timed.
 *
 * From Linux 6.18 on it matters whether the MSR filter and the memory slot come before KVM_CREATE_IRQCHIP: it leaves a
 * grace period of the VM's SRCU behind, for which the other two wait.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RAM_BYTES (UINT64_C(16) << 20)
#define FLAT_BASE UINT64_C(0x7c00)
#define IDENTITY_MAP UINT64_C(0xfffbc000)
#define TSS UINT64_C(0xfffbd000)
#define KVM_MSRS 0x4b564d00
#define CPUID_ENTRIES 256
#define RFLAGS_ALWAYS_ONE 2

enum step { OPEN, RAM, VM, FILTER, SLOT, IRQCHIP, VCPU, CPUID, REGISTERS, FIRST_EXIT, STEPS };

struct bare_vm {
	int kvm, memory, vm, vcpu;
	uint8_t *ram;
	struct kvm_run *run;
	size_t run_bytes;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static bool open_kvm(struct bare_vm *bare)
{
	bare->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	return bare->kvm >= 0;
}

static bool make_ram(struct bare_vm *bare, const void *image, size_t image_bytes)
{
	void *ram;

	bare->memory = memfd_create("bare-vm-ram", MFD_CLOEXEC);
	if (bare->memory < 0 || ftruncate(bare->memory, RAM_BYTES) != 0 || image_bytes > RAM_BYTES - FLAT_BASE)
		return false;
	ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, bare->memory, 0);
	if (ram == MAP_FAILED)
		return false;
	bare->ram = ram;
	memcpy(bare->ram + FLAT_BASE, image, image_bytes);
	return true;
}

static bool make_vm(struct bare_vm *bare)
{
	bare->vm = ioctl(bare->kvm, KVM_CREATE_VM, 0);
	return bare->vm >= 0;
}

static bool filter_msrs(struct bare_vm *bare)
{
	uint64_t none_allowed = 0; /* KVM reads whole words */
	struct kvm_enable_cap exits = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_FILTER } };
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };

	filter.ranges[0].flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
	filter.ranges[0].base = KVM_MSRS;
	filter.ranges[0].nmsrs = 2;
	filter.ranges[0].bitmap = (uint8_t *)&none_allowed;
	return ioctl(bare->vm, KVM_ENABLE_CAP, &exits) == 0 && ioctl(bare->vm, KVM_X86_SET_MSR_FILTER, &filter) == 0;
}

static bool map_ram(struct bare_vm *bare)
{
	uint64_t identity_map = IDENTITY_MAP;
	struct kvm_userspace_memory_region region = { .memory_size = RAM_BYTES };

	region.userspace_addr = (uintptr_t)bare->ram;
	return ioctl(bare->vm, KVM_SET_TSS_ADDR, TSS) == 0 &&
	       ioctl(bare->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) == 0 &&
	       ioctl(bare->vm, KVM_SET_USER_MEMORY_REGION, &region) == 0;
}

static bool make_irqchip(struct bare_vm *bare)
{
	return ioctl(bare->vm, KVM_CREATE_IRQCHIP, 0) == 0;
}

static bool make_vcpu(struct bare_vm *bare)
{
	int run_bytes = ioctl(bare->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	void *run;

	bare->vcpu = ioctl(bare->vm, KVM_CREATE_VCPU, 0);
	if (bare->vcpu < 0 || run_bytes <= 0)
		return false;
	run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, bare->vcpu, 0);
	if (run == MAP_FAILED)
		return false;
	bare->run = run;
	bare->run_bytes = (size_t)run_bytes;
	return true;
}

static bool set_cpuid(struct bare_vm *bare)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(cpuid->entries[0]));
	bool is_set;

	if (!cpuid)
		return false;
	cpuid->nent = CPUID_ENTRIES;
	is_set = ioctl(bare->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0 &&
		 ioctl(bare->vcpu, KVM_SET_CPUID2, cpuid) == 0;
	free(cpuid);
	return is_set;
}

static bool enter_real_mode(struct bare_vm *bare)
{
	struct kvm_regs regs = { .rip = FLAT_BASE, .rflags = RFLAGS_ALWAYS_ONE };
	struct kvm_sregs sregs;

	if (ioctl(bare->vcpu, KVM_GET_SREGS, &sregs) != 0)
		return false;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	return ioctl(bare->vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(bare->vcpu, KVM_SET_REGS, &regs) == 0;
}

static bool run(struct bare_vm *bare)
{
	return ioctl(bare->vcpu, KVM_RUN, 0) == 0 && bare->run->exit_reason == KVM_EXIT_IO;
}

static bool take(enum step step, struct bare_vm *bare, const void *image, size_t image_bytes)
{
	switch (step) {
	case OPEN:
		return open_kvm(bare);
	case RAM:
		return make_ram(bare, image, image_bytes);
	case VM:
		return make_vm(bare);
	case FILTER:
		return filter_msrs(bare);
	case SLOT:
		return map_ram(bare);
	case IRQCHIP:
		return make_irqchip(bare);
	case VCPU:
		return make_vcpu(bare);
	case CPUID:
		return set_cpuid(bare);
	case REGISTERS:
		return enter_real_mode(bare);
	default:
		return run(bare);
	}
}

void bare_vm_close(struct bare_vm *bare)
{
	if (bare->run)
		munmap(bare->run, bare->run_bytes);
	close(bare->vcpu);
	close(bare->vm);
	close(bare->kvm);
	if (bare->ram)
		munmap(bare->ram, RAM_BYTES);
	close(bare->memory);
	free(bare);
}

/* Take all steps in this order, up to the guest's first exit, a write of a port; `ns` has what each of them took, by
 * its number.  NULL if one fails.
 */
struct bare_vm *bare_vm_start(const void *image, size_t image_bytes, const int order[STEPS], uint64_t ns[STEPS])
{
	struct bare_vm *bare = calloc(1, sizeof(*bare));

	if (!bare)
		return NULL;
	bare->kvm = bare->memory = bare->vm = bare->vcpu = -1;
	for (int i = 0; i < STEPS; i++) {
		uint64_t begun_ns = now_ns();

		if (!take((enum step)order[i], bare, image, image_bytes)) {
			bare_vm_close(bare);
			return NULL;
		}
		ns[order[i]] = now_ns() - begun_ns;
	}
	return bare;
}
