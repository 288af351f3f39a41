/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* What vmm.c has beside its clock: a VM of 2 MiB, its vCPUs, and a guest that reads its clock.
 *
 * Each vCPU registers a time page and then reads it in ring 3, as a vDSO does.  It logs what it reads, and exits by a
 * write to a port whenever its log is full.
 */
#ifndef TINY_VM_H
#define TINY_VM_H

#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define RAM_BYTES 0x200000
#define LOG_READINGS 0x1000

/* Guest-physical memory, which is guest-virtual memory, too: one large page. */
enum { GDT = 0x1000, PML4 = 0x2000, PDPT = 0x3000, PAGE_DIRECTORY = 0x4000, CODE = 0x5000, WALL_CLOCK = 0x6000,
       TIME_PAGES = 0x7000, STACKS = 0x8000, LOGS = 0x100000 };

struct reading {
	uint64_t tsc;
	uint64_t ns;
};

/* %rdi: the vCPU's time page.  %rsi and %rbp: its log and that one's end. */
__asm__(".pushsection .rodata\n"
	"guest:		mov $0x40000001, %eax; cpuid; test $8, %al; jz no_clock\n" /* CLOCKSOURCE2 */
	"		mov $0x4b564d00, %ecx; mov $0x6000, %eax; xor %edx, %edx; wrmsr\n" /* the wall clock */
	"		inc %ecx; lea 1(%rdi), %eax; wrmsr\n" /* the time page, enabled */
	"		push $0x0b; push %rsp; push $0x3002; push $0x13\n" /* to ring 3, which may use ports */
	"		lea again(%rip), %rax; push %rax; iretq\n"
	"no_clock:	hlt\n"
	"again:		mov %rsi, %rbx\n"
	"read:		mov (%rdi), %r8d; and $-2, %r8d\n" /* version, odd in an update */
	"		lfence; rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, %r9\n"
	"		sub 8(%rdi), %rax\n" /* tsc_timestamp */
	"		movsbl 28(%rdi), %ecx; test %ecx, %ecx; js right\n" /* tsc_shift */
	"		shl %cl, %rax; jmp scale\n"
	"right:		neg %ecx; shr %cl, %rax\n"
	"scale:		mov 24(%rdi), %edx; mul %rdx; shrd $32, %rdx, %rax\n" /* tsc_to_system_mul */
	"		add 16(%rdi), %rax\n" /* system_time */
	"		cmp (%rdi), %r8d; jne read\n"
	"		mov %r9, (%rbx); mov %rax, 8(%rbx); add $16, %rbx; cmp %rbp, %rbx; jb read\n"
	"		out %al, $0x10; jmp again\n"
	"guest_end:	.popsection");
extern const uint8_t guest[], guest_end[];

/* End with one line: this host is not up to it. */
static inline void lack(const char *what, const char *why)
{
	fprintf(stderr, "vmm: %s: %s\n", what, why);
	exit(2);
}

#define CALL(fd, request, argument) call(fd, request, (uintptr_t)(argument), #request)
static inline int call(int fd, unsigned long request, uintptr_t argument, const char *name)
{
	int result = ioctl(fd, request, argument);

	if (result < 0)
		lack(name, strerror(errno));
	return result;
}

static inline void *map(int fd, size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);

	if (memory == MAP_FAILED || madvise(memory, bytes, MADV_DONTFORK) != 0)
		lack("mmap", strerror(errno));
	return memory;
}

static inline uint64_t log_address(size_t vcpu)
{
	return LOGS + vcpu * LOG_READINGS * sizeof(struct reading);
}

/* Returns the VM's memory, with the guest in it. */
static inline uint8_t *make_ram(int vm)
{
	/* null; data and code of ring 3; code of ring 0 */
	const uint64_t gdt[] = { 0, 0x00cff3000000ffff, 0x00affb000000ffff, 0x00af9b000000ffff };
	const uint64_t tables[] = { PDPT | 7, PAGE_DIRECTORY | 7, 0x87 }; /* present, writable, user; a large page */
	uint8_t *ram = map(-1, RAM_BYTES);
	struct kvm_userspace_memory_region slot = { .memory_size = RAM_BYTES, .userspace_addr = (uintptr_t)ram };

	memcpy(ram + CODE, guest, (size_t)(guest_end - guest));
	memcpy(ram + GDT, gdt, sizeof gdt);
	for (size_t level = 0; level < 3; level++)
		memcpy(ram + PML4 + 0x1000 * level, &tables[level], sizeof tables[level]);
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &slot);
	return ram;
}

/* What KVM supports, with `features` of its own, and without an invariant TSC, which Linux would take for its clock. */
static inline void set_cpuid(int kvm, int fd, uint32_t features)
{
	enum { ENTRIES = 256 };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof cpuid->entries[0]);

	if (!cpuid)
		lack("calloc", strerror(errno));
	cpuid->nent = ENTRIES;
	CALL(kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
	for (size_t i = 0; i < cpuid->nent; i++) {
		if (cpuid->entries[i].function == 0x40000001)
			cpuid->entries[i].eax = features;
		if (cpuid->entries[i].function == 0x80000007)
			cpuid->entries[i].edx &= ~0x100u;
	}
	CALL(fd, KVM_SET_CPUID2, cpuid);
	free(cpuid);
}

/* Put a vCPU, as reset left it, to the guest's beginning: long mode, ring 0. */
static inline void set_registers(int fd, size_t vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = {
		.rip = CODE, .rflags = 2, .rsp = STACKS + 0x100 * (vcpu + 1), .rdi = TIME_PAGES + 64 * vcpu,
		.rsi = log_address(vcpu), .rbp = log_address(vcpu + 1),
	};

	CALL(fd, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80000011; /* PG, ET, PE */
	sregs.cr3 = PML4;
	sregs.cr4 = 0x20;       /* PAE */
	sregs.efer = 0x500;     /* LMA, LME */
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 0x1f;
	sregs.cs.base = 0;
	sregs.cs.selector = 0x18;
	sregs.cs.l = sregs.cs.g = 1;
	CALL(fd, KVM_SET_SREGS, &sregs);
	CALL(fd, KVM_SET_REGS, &regs);
}

#endif
