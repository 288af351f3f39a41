"""Real-mode guests of a few bytes, and a bare VM for them: nothing but /dev/kvm, memory and vCPUs."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from pvclock.kvm import Kvm, Vcpu, Vm

RAM_BYTES: Final = 0x10000
CODE: Final = 0x7C00
RESULT: Final = 0x2000
STACK: Final = 0x7000
UNMAPPED: Final = 0x20000
"""Behind the bare VM's memory."""

GP_VECTOR: Final = 13
GP_HANDLER: Final = 0x3000

REGISTERS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags"),
    *(f"r{number}" for number in range(8, 16)),
)

HLT: Final = bytes.fromhex("f4")
COUNT: Final = bytes.fromhex("66ff07 ebfb")  # 1: incl (%bx); jmp 1b
COUNT_AND_EXIT: Final = bytes.fromhex("66ff07 e610 ebf9")  # 1: incl (%bx); out %al, $0x10; jmp 1b


class Bare(NamedTuple):
    """A VM, by default without interrupt controllers: every vCPU runs as soon as it is told to, and HLT is an exit."""

    kvm: Kvm
    vm: Vm
    vcpus: list[Vcpu]
    ram: mmap.mmap

    def result(self, length: int = 4, at: int = RESULT) -> int:
        """The little-endian number that the guest left at `at`."""
        return int.from_bytes(self.ram[at : at + length], "little")

    def count(self, vcpu: int) -> int:
        """How often vCPU's COUNT has gone round, modulo 2^32."""
        return self.result(4, RESULT + 4 * vcpu)


@contextmanager
def bare_vm(code: bytes, *, vcpus: int = 1, irqchip: bool = False) -> Iterator[Bare]:
    """A VM whose vCPUs all stand at the beginning of `code`, each with the address of its own count in BX."""
    with ExitStack() as resources:
        ram = resources.enter_context(mmap.mmap(-1, RAM_BYTES))
        kvm = resources.enter_context(Kvm())
        vm = resources.enter_context(kvm.create_vm())
        vm.set_tss_addr(0xFFFBD000)
        vm.set_identity_map_addr(0xFFFBC000)
        vm.set_user_memory_region(0, 0, ram)
        if irqchip:
            vm.create_irqchip()
        cpus = [resources.enter_context(vm.create_vcpu(number)) for number in range(vcpus)]
        for vcpu in cpus:
            reset(vcpu)
        ram[CODE : CODE + len(code)] = code
        ram[4 * GP_VECTOR : 4 * GP_VECTOR + 4] = GP_HANDLER.to_bytes(4, "little")
        handler = bytes.fromhex("c60600200d") + HLT  # movb $13, RESULT
        ram[GP_HANDLER : GP_HANDLER + len(handler)] = handler
        yield Bare(kvm, vm, cpus, ram)


def reset(vcpu: Vcpu) -> None:
    """Put a vCPU to the beginning of the code, in real mode."""
    sregs = vcpu.get_sregs()
    sregs["cs"].update(base=0, selector=0)
    vcpu.set_sregs(sregs)
    registers = {"rip": CODE, "rflags": 2, "rsp": STACK, "rbx": RESULT + 4 * vcpu.vcpu_id}
    vcpu.set_regs({**vcpu.get_regs(), **registers})


def out(port: int, value: int) -> bytes:
    """`out` of one byte to a port below 256."""
    return bytes([0xB0, value, 0xE6, port])


def read_msr(index: int) -> bytes:
    """RDMSR; the value's halves go to RESULT and RESULT + 4."""
    return b"\x66\xb9" + index.to_bytes(4, "little") + bytes.fromhex("0f32 66a30020 6689160420") + HLT


def write_msr(index: int, value: int) -> bytes:
    """WRMSR, and no more: what follows is up to the caller."""
    low, high = (value & 0xFFFFFFFF).to_bytes(4, "little"), (value >> 32).to_bytes(4, "little")
    return b"\x66\xb9" + index.to_bytes(4, "little") + b"\x66\xb8" + low + b"\x66\xba" + high + b"\x0f\x30"


def rep_outs(port: int, address: int, count: int, size: int = 1) -> bytes:
    """REP OUTSB, OUTSW or OUTSL of `count` items at `address`."""
    instruction = {1: "f36e", 2: "f36f", 4: "66f36f"}[size]
    mov_cx_dx_si = b"".join(
        bytes([opcode]) + value.to_bytes(2, "little")
        for opcode, value in ((0xB9, count), (0xBA, port), (0xBE, address))
    )
    return mov_cx_dx_si + bytes.fromhex(instruction)


def rep_ins(port: int, address: int, count: int) -> bytes:
    """REP INSB of `count` bytes to `address`."""
    mov_cx_dx_di = b"".join(
        bytes([opcode]) + value.to_bytes(2, "little")
        for opcode, value in ((0xB9, count), (0xBA, port), (0xBF, address))
    )
    return mov_cx_dx_di + bytes.fromhex("f36c")
