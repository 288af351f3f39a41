/* SPDX-License-Identifier: Apache-2.0
 *
 * The least that can run a guest: KVM_RUN again and again, and no look at why it returned, but for the exit port.
 *
 * The guest is a flat real-mode image.  A vCPU of pvclock's Machine has the same in-kernel devices and MSR filter.
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
#include <unistd.h>

#define RAM_BYTES (UINT64_C(1) << 20)
#define FLAT_BASE UINT64_C(0x7c00)
#define IDENTITY_MAP UINT64_C(0xfffbc000)
#define TSS UINT64_C(0xfffbd000)
#define EXIT_PORT 0xf4
#define RFLAGS_ALWAYS_ONE 2

struct minimal_vm {
	int kvm, vm, vcpu;
	uint8_t *ram;
	struct kvm_run *run;
	size_t run_bytes;
};

/* Reads and writes of one MSR come to user space. */
static bool filter_msr(int vm, uint32_t msr)
{
	uint64_t none_allowed = 0; /* KVM reads whole words */
	struct kvm_enable_cap exits = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_FILTER } };
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };

	filter.ranges[0].flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
	filter.ranges[0].base = msr;
	filter.ranges[0].nmsrs = 1;
	filter.ranges[0].bitmap = (uint8_t *)&none_allowed;
	return ioctl(vm, KVM_ENABLE_CAP, &exits) == 0 && ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter) == 0;
}

static bool make_ram(struct minimal_vm *minimal, const void *image, size_t image_bytes)
{
	struct kvm_userspace_memory_region region = { .memory_size = RAM_BYTES };
	void *ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (ram == MAP_FAILED || image_bytes > RAM_BYTES - FLAT_BASE)
		return false;
	minimal->ram = ram;
	memcpy(minimal->ram + FLAT_BASE, image, image_bytes);
	region.userspace_addr = (uintptr_t)ram;
	return ioctl(minimal->vm, KVM_SET_USER_MEMORY_REGION, &region) == 0;
}

static bool make_vm(struct minimal_vm *minimal, uint32_t msr)
{
	uint64_t identity_map = IDENTITY_MAP;

	minimal->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	minimal->vm = ioctl(minimal->kvm, KVM_CREATE_VM, 0);
	return minimal->vm >= 0 && ioctl(minimal->vm, KVM_SET_TSS_ADDR, TSS) == 0 &&
	       ioctl(minimal->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) == 0 &&
	       ioctl(minimal->vm, KVM_CREATE_IRQCHIP, 0) == 0 && filter_msr(minimal->vm, msr);
}

static bool enter_real_mode(int vcpu)
{
	struct kvm_regs regs = { .rip = FLAT_BASE, .rflags = RFLAGS_ALWAYS_ONE };
	struct kvm_sregs sregs;

	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) != 0)
		return false;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	return ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu, KVM_SET_REGS, &regs) == 0;
}

static bool make_vcpu(struct minimal_vm *minimal)
{
	int run_bytes = ioctl(minimal->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	void *run;

	minimal->vcpu = ioctl(minimal->vm, KVM_CREATE_VCPU, 0);
	if (minimal->vcpu < 0 || run_bytes <= 0)
		return false;
	run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, minimal->vcpu, 0);
	if (run == MAP_FAILED)
		return false;
	minimal->run = run;
	minimal->run_bytes = (size_t)run_bytes;
	return enter_real_mode(minimal->vcpu);
}

void minimal_vm_close(struct minimal_vm *minimal)
{
	if (minimal->run)
		munmap(minimal->run, minimal->run_bytes);
	close(minimal->vcpu);
	close(minimal->vm);
	close(minimal->kvm);
	if (minimal->ram)
		munmap(minimal->ram, RAM_BYTES);
	free(minimal);
}

/* NULL if the VM cannot be made. */
struct minimal_vm *minimal_vm_open(const void *image, size_t image_bytes, uint32_t msr)
{
	struct minimal_vm *minimal = calloc(1, sizeof(*minimal));

	if (!minimal)
		return NULL;
	minimal->kvm = minimal->vm = minimal->vcpu = -1;
	if (make_vm(minimal, msr) && make_ram(minimal, image, image_bytes) && make_vcpu(minimal))
		return minimal;
	minimal_vm_close(minimal);
	return NULL;
}

/* Run until the guest writes the exit port; returns the exits before that, or -1 if KVM_RUN fails.  May be called
 * again: the guest goes on.
 */
int64_t minimal_vm_run(struct minimal_vm *minimal)
{
	const struct kvm_run *run = minimal->run;
	int64_t exits = 0;

	while (ioctl(minimal->vcpu, KVM_RUN, 0) == 0) {
		if (run->exit_reason == KVM_EXIT_IO && run->io.port == EXIT_PORT)
			return exits;
		exits++;
	}
	return -1;
}
