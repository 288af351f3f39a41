"""What is told of a guest that crashes: its registers and the code at its RIP.

FLDS ends a run where its operand is in no memory: KVM has to emulate that access, and knows no x87 instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from pvclock.boot import BootSource
from pvclock.errors import GuestCrashed, RangeError
from pvclock.kvm.exits import InternalError, Shutdown
from pvclock.machine import Machine
from pvclock.machine.crash import CrashSite, find_site
from tests.unit.boot_images import content_offset, elf_file, program_header
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

FLDS_16: Final = bytes.fromhex("d9060000")  # flds 0
REAL_MODE: Final = bytes.fromhex("b80020 8ed8") + FLDS_16  # mov $0x2000, %ax; mov %ax, %ds
FLDS_64: Final = bytes.fromhex("d900")  # flds (%rax)
LONG_MODE: Final = bytes.fromhex("b800000020") + FLDS_64  # mov $0x20000000, %eax: mapped, and no memory
RAM_BYTES: Final = 1 << 16
ONE_MIB: Final = 1 << 20
HIGH: Final = 0xFFFF_8000_0000_0000
"""Where the upper half of the linear addresses begins."""


def crash(
    image: bytes | BootSource, change: Callable[[Machine], object] | None = None, memory_bytes: int = 4 * ONE_MIB
) -> tuple[object, CrashSite]:
    """Why and where the guest crashes.  change: of the machine, before it runs."""
    with Machine(image, memory_bytes=memory_bytes) as machine:
        if change is not None:
            change(machine)
        machine.start()
        with pytest.raises(GuestCrashed) as caught:
            machine.wait(HANG_S)
        assert isinstance(caught.value.site, CrashSite)
        assert str(caught.value.site) in str(caught.value)
        return caught.value.reason, caught.value.site


def long_mode(code: bytes, at: int = ONE_MIB) -> BootSource:
    """An image that is entered in 64-bit mode at its first byte."""
    header = program_header(64, offset=content_offset(64, 1), gpa=at, file_bytes=len(code), memory_bytes=len(code))
    return BootSource(elf_file(64, [header], code, entry=at), protocol="linux64")


def page_tables(machine: Machine) -> int:
    """The PML4; the other two are on the pages behind it."""
    return int(machine.vcpus[0].get_sregs()["cr3"])


def move_rip(machine: Machine, by: int) -> None:
    """Let vCPU 0 begin elsewhere."""
    regs = machine.vcpus[0].get_regs()
    machine.vcpus[0].set_regs({**regs, "rip": regs["rip"] + by})


def test_an_instruction_that_kvm_cannot_emulate() -> None:
    """Real mode: the code from RIP on and in front of it, the registers, and what KVM itself had of the instruction."""
    reason, site = crash(bytes([0x90] * 32) + REAL_MODE + b"\xf4", memory_bytes=RAM_BYTES)
    assert isinstance(reason, InternalError)
    assert reason.suberror == 1
    assert reason.fetched in (b"", site.code[: len(reason.fetched)])  # none before Linux 5.14
    assert (site.linear, site.code) == (0x7C25, FLDS_16 + b"\xf4" + bytes(11))
    assert site.before == bytes([0x90] * 11) + REAL_MODE[:5]
    assert {name: site.registers[name] for name in ("rax", "rip", "cs", "cs_base", "efer")} == {
        "rax": 0x2000,
        "rip": 0x7C25,
        "cs": 0,
        "cs_base": 0,
        "efer": 0,
    }
    assert str(site) == (
        "code at 0x7c25: 90 90 90 90 90 90 90 90 90 90 90 b8 00 20 8e d8 "
        "<d9> 06 00 00 f4 00 00 00 00 00 00 00 00 00 00 00"
    )


def test_a_segment_with_a_base() -> None:
    """Real mode's code segment counts."""
    _, site = crash(bytes.fromhex("ea 0500c007") + REAL_MODE, memory_bytes=RAM_BYTES)  # ljmp $0x7c0, $5
    assert (site.linear, site.registers["rip"], site.registers["cs_base"]) == (0x7C0A, 0xA, 0x7C00)
    assert site.code.startswith(FLDS_16)


def test_code_up_to_the_end_of_memory() -> None:
    """There is no more of it than there is memory."""
    length = RAM_BYTES - 0x7C00
    jump = b"\xe9" + (length - len(REAL_MODE) - 3).to_bytes(2, "little")
    _, site = crash(jump.ljust(length - len(REAL_MODE), b"\x90") + REAL_MODE, memory_bytes=RAM_BYTES)
    assert (site.linear, site.code) == (RAM_BYTES - 4, FLDS_16)


def test_code_by_the_guests_page_tables() -> None:
    """64-bit mode: its address is linear, and its page tables say where the code is."""

    def map_high(machine: Machine) -> None:
        table = page_tables(machine)
        machine.memory.write(table + 256 * 8, machine.memory.read(table, 8))
        move_rip(machine, HIGH)

    reason, site = crash(long_mode(LONG_MODE), map_high)
    assert isinstance(reason, InternalError)
    assert site.linear == site.registers["rip"] == HIGH + ONE_MIB + 5
    assert (site.before[-5:], site.code[:2]) == (LONG_MODE[:5], FLDS_64)
    assert site.registers["cr3"] == 0xB000


def test_code_behind_a_page_that_is_not_there() -> None:
    """What is in front of it begins with its own page."""

    def unmap_below(machine: Machine) -> None:
        machine.memory.write(page_tables(machine) + 2 * 4096, bytes(8))

    _, site = crash(long_mode(b"\x90" + LONG_MODE, at=2 * ONE_MIB), unmap_below)
    assert (site.linear, site.before) == (2 * ONE_MIB + 6, b"\x90" + LONG_MODE[:5])
    assert site.code == FLDS_64 + bytes(14)


@pytest.mark.parametrize(
    "image",
    [
        bytes.fromhex("ea00000020"),  # ljmp $0x2000, $0: where no memory is
        long_mode(bytes.fromhex("48b80000000001000000 ffe0")),  # mov $1 << 32, %rax; jmp *%rax: where nothing is mapped
    ],
    ids=["no-memory", "unmapped"],
)
def test_no_code_in_memory(image: bytes | BootSource) -> None:
    """It is said that there is none, after a triple fault, too."""
    reason, site = crash(image, memory_bytes=4 * ONE_MIB if isinstance(image, BootSource) else RAM_BYTES)
    assert isinstance(reason, InternalError | Shutdown)
    assert (site.before, site.code) == (b"", b"")
    assert str(site) == f"there is no code in memory at {site.linear:#x}"


@pytest.mark.parametrize("rip", [0, 3, (1 << 64) - 3, HIGH - 1], ids=hex)
def test_a_rip_at_an_end(rip: int) -> None:
    """What would be in front of 0, behind the last address and between the halves is not looked for."""
    with Machine(long_mode(LONG_MODE), memory_bytes=4 * ONE_MIB) as machine:
        move_rip(machine, rip - ONE_MIB)
        site = find_site(machine.vcpus[0], machine.memory)
        assert site is not None
        is_mapped = rip < ONE_MIB
        assert (site.linear, site.before, site.code) == (rip, bytes(rip * is_mapped), bytes(16 * is_mapped))


def test_a_vcpu_that_tells_nothing() -> None:
    """There is no site, and no other error in the crash's place."""
    with Machine(REAL_MODE, memory_bytes=RAM_BYTES) as machine:
        vcpu, memory = machine.vcpus[0], machine.memory
        vcpu.close()
        assert find_site(vcpu, memory) is None


def test_translations() -> None:
    """By the vCPU's page tables where it has paging, else as they are; None for what is not mapped."""
    with Machine(long_mode(LONG_MODE), memory_bytes=4 * ONE_MIB) as machine:
        vcpu = machine.vcpus[0]
        machine.memory.write(page_tables(machine) + 2 * 4096 + 8, (0x83).to_bytes(8, "little"))  # 2 MiB on: 0 again
        assert [vcpu.translate(linear) for linear in (5, 3 * ONE_MIB, 1 << 30, HIGH)] == [5, ONE_MIB, None, None]
        with pytest.raises(RangeError, match="linear"):
            vcpu.translate(1 << 64)
    with Machine(REAL_MODE, memory_bytes=RAM_BYTES) as machine:
        assert machine.vcpus[0].translate(0x12345) == 0x12345
