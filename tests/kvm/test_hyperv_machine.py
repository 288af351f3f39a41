"""A machine's services for the Hyper-V provider, asked by a guest on a real vCPU: timers, reset, hypercall page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from pvclock import Machine
from pvclock.machine import EXIT_PORT
from tests.kvm.guests import out, write_msr
from tests.kvm.interrupt_guests import COUNT, IMAGE, counting, set_vector, unless_count
from tests.kvm.test_machine_services import BOOTS_PORT, Boots
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.kvm

VECTOR: Final = 0x51
UD: Final = 6

GUEST_OS_ID, HYPERCALL, RESET = 0x40000000, 0x40000001, 0x40000003
STIMER0_CONFIG, STIMER0_COUNT = 0x400000B0, 0x400000B1
PERIODIC, AUTO_ENABLE, DIRECT = 1 << 1, 1 << 3, 1 << 12

IDENTIFY: Final = write_msr(GUEST_OS_ID, 1)
PAGE: Final = 0x3000
RETURN_ADDRESS: Final = 0x2000


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Turn a wait for ever into a failure."""
    with alarm_after(HANG_S):
        yield


@pytest.mark.row("H-42", "X-03")
def test_a_synthetic_timer_wakes_its_guest() -> None:
    """In direct mode, each period of 1 ms, out of HLT; guest time has come as far by then."""
    config = PERIODIC | AUTO_ENABLE | DIRECT | VECTOR << 4
    setup = IDENTIFY + write_msr(STIMER0_CONFIG, config) + write_msr(STIMER0_COUNT, 10_000)
    with Machine(counting(VECTOR, setup, unless_count(20, out(EXIT_PORT, 4))), provider="HyperV") as machine:
        assert machine.clock is not None
        machine.start()
        assert machine.wait() == 4
        assert machine.memory.read(COUNT, 4) == bytes((20, 0, 0, 0))
        assert machine.clock.now() >= 20_000_000
        assert machine.clock_service.timer_thread is not None
        assert machine.clock_service.timer_thread.failures == ()


@pytest.mark.row("H-33")
def test_the_reset_msr_resets_the_machine() -> None:
    """The guest boots anew, once."""
    read = bytes((0xE4, BOOTS_PORT)) + bytes.fromhex("84c0 7404")  # in; test %al, %al; jz
    image = read + bytes((0xE6, EXIT_PORT)) + bytes.fromhex("ebfe") + write_msr(RESET, 1) + bytes.fromhex("ebfe")
    with Machine(image, provider="HyperV") as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, Boots())
        machine.start()
        assert machine.wait() == 1


@pytest.mark.row("H-31", "H-64")
def test_a_call_of_the_hypercall_page_in_real_mode() -> None:
    """It gets #UD at the page's first instruction: hypercalls need protected mode."""
    start = bytes.fromhex("bc0070") + IDENTIFY + write_msr(HYPERCALL, PAGE | 1)  # mov $0x7000, %sp
    call_ends = IMAGE + 12 + len(start) + 3
    call = b"\xe8" + (PAGE - call_ends & 0xFFFF).to_bytes(2, "little")
    handler = bytes.fromhex("58 a30020") + out(EXIT_PORT, UD)  # pop %ax; mov %ax, RETURN_ADDRESS
    with Machine(set_vector(UD, call_ends) + start + call + handler, provider="HyperV") as machine:
        machine.start()
        assert machine.wait() == UD
        assert machine.memory.read(RETURN_ADDRESS, 2) == PAGE.to_bytes(2, "little")
