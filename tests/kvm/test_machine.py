"""Machines from image to exit code: ports, console, crashes, both clocks, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import pytest

from pvclock.errors import ConfigError, GuestCrashed, ImageError, KvmUnavailable, PvclockError, StateError, WrongType
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.host.simulated import SimulatedBackend
from pvclock.host.this_host import HostBackend
from pvclock.kvm.exits import InternalError
from pvclock.machine import CONSOLE_PORT, EXIT_PORT, Machine
from pvclock.machine.devices.console import CONSOLE_KEPT_BYTES
from pvclock.machine.ram import Ram
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, probe_machine, wait_until_reading
from pvclock.payloads.probe import State, time_page_address
from tests.kvm.guests import HLT, out, read_msr, rep_ins, rep_outs, write_msr
from tests.kvm.leaks import held, ram_mappings
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]

CLOCKS: list[Literal["engine", "kernel"]] = ["engine", "kernel"]

IMAGE = 0x7C00
DATA = 0x5000
SYSTEM_TIME = 0x4B564D01
SPIN = bytes.fromhex("66ff060050 ebf9")  # 1: incl DATA; jmp 1b
DONE = out(EXIT_PORT, 0)


def run(image: bytes, **options: Any) -> tuple[int, str]:  # noqa: ANN401  # Machine's own options
    """Run an image to its end; its exit code and what it wrote."""
    with Machine(image, **options) as machine:
        machine.start()
        return machine.wait(HANG_S), machine.console


def on_gp(body: bytes, otherwise: bytes) -> bytes:
    """`body`, and `otherwise` where it raises #GP."""
    handler = IMAGE + 12 + len(body)
    return b"\xc7\x06\x34\x00" + handler.to_bytes(2, "little") + bytes.fromhex("c70636000000") + body + otherwise


# The way out


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("code", [0, 1, 255])
def test_the_exit_port_ends_the_run(clock: str, code: int) -> None:
    """The byte written there is the exit code, whoever serves the clock."""
    assert run(out(EXIT_PORT, code) + out(EXIT_PORT, 99) + HLT, clock=clock) == (code, "")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(bytes.fromhex("b80703 e7f4"), id="word"),
        pytest.param(bytes.fromhex("66b807030201 66e7f4"), id="dword"),
        pytest.param(b"\xc6\x06\x00\x50\x07" + rep_outs(EXIT_PORT, DATA, 300), id="repeated"),
        pytest.param(b"\xc6\x06\x00\x50\x07" + rep_outs(EXIT_PORT, DATA, 300, 4), id="repeated-dword"),
    ],
)
def test_the_exit_port_written_in_odd_ways(write: bytes) -> None:
    """Wide and repeated writes end the run with their first byte."""
    assert run(write) == (7, "")


def test_a_guest_that_does_not_end() -> None:
    """wait() gives up in time and says what can be done; after stop() there is no exit code."""
    with Machine(SPIN) as machine:
        with pytest.raises(StateError, match=r"^wait: the machine was never started; start\(\) it$"):
            machine.wait()
        with pytest.raises(WrongType, match=r"^timeout_s is '1', a str; it can be a number$"):
            machine.wait("1")  # type: ignore[arg-type]
        machine.start()
        with pytest.raises(StateError, match=r"has not ended after 0\.01 s; wait longer or stop"):
            machine.wait(0.01)
        machine.stop()
        with pytest.raises(StateError, match="the machine was stopped"):
            machine.wait()


def test_a_guest_that_cannot_go_on() -> None:
    """A crash is an error that names the vCPU and why; the console can still be read."""
    jump_to_nowhere = bytes.fromhex("ea00000020")  # ljmp $0x2000, $0
    with Machine(out(CONSOLE_PORT, 0x21) + jump_to_nowhere, memory_bytes=1 << 16) as machine:
        machine.start()
        with pytest.raises(GuestCrashed) as caught:
            machine.wait(HANG_S)
        assert caught.value.vcpu == 0
        assert isinstance(caught.value.reason, InternalError)
        assert machine.console == "!"


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_wait() -> None:
    """Ctrl-C gets out of wait(), and the machine can be closed."""
    before = held()
    with Machine(SPIN) as machine:
        machine.start()

        def interrupt() -> None:
            while not any(machine.memory.read(DATA, 4)):
                pass
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        def wait() -> None:
            thread.start()
            machine.wait(HANG_S)

        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            wait()
        thread.join()
    assert held() == before


# The console


def test_the_console_keeps_its_order_past_its_buffer() -> None:
    """12288 single bytes, more than are kept without an exit, come in the order in which they were written."""
    # mov $0x3000, %cx; 1: mov %cl, %al; and $0x7f, %al; out %al, $0xe9; loop 1b
    code = bytes.fromhex("b90030 88c8 247f e6e9 e2f8") + DONE
    assert run(code) == (0, "".join(chr(n & 0x7F) for n in range(0x3000, 0, -1)))


def test_wide_and_repeated_writes_keep_their_place() -> None:
    """Bytes that are kept, words, and repeated writes stand in the console as the guest wrote them."""
    code = out(CONSOLE_PORT, 0x41) + bytes.fromhex("b84243 e7e9") + out(CONSOLE_PORT, 0x44)
    code += b"\xc6\x06\x00\x50\x45" + rep_outs(CONSOLE_PORT, DATA, 1) + out(CONSOLE_PORT, 0x46)
    assert run(code + DONE) == (0, "ABCDEF")


def test_a_console_that_is_no_text() -> None:
    """UTF-8 is decoded, and what is none is replaced."""
    code = b"".join(out(CONSOLE_PORT, byte) for byte in "aµ€".encode() + b"\xff")
    assert run(code + DONE) == (0, "aµ€\N{REPLACEMENT CHARACTER}")


def test_a_guest_that_never_stops_writing() -> None:
    """The host keeps the end of an endless console, and no more."""
    with Machine(HLT) as machine:
        for byte in (b"a", b"b"):
            machine._hardware.board.console.write(0, byte * (CONSOLE_KEPT_BYTES * 3 // 4))
        assert len(machine.console) == CONSOLE_KEPT_BYTES
        assert machine.console.count("b") == CONSOLE_KEPT_BYTES * 3 // 4


# Guests that mean no good


def test_ports_and_memory_that_are_not_there() -> None:
    """Where nobody answers a read gives ones, a write goes nowhere, and the guest goes on."""
    mmio = bytes.fromhex("b80020 8ed8 66a10000 66a30400 b80000 8ed8")  # read and write behind 64 KiB of RAM
    code = rep_ins(0x10, DATA, 300) + mmio + b"\xa0" + (DATA + 299).to_bytes(2, "little") + b"\xe6\xf4"
    assert run(code, memory_bytes=1 << 16)[0] == 0xFF


@pytest.mark.row("K-01")
@pytest.mark.parametrize("access", [read_msr(0x4B564D50)[:-1], write_msr(0x4B564D50, 1)], ids=["read", "write"])
def test_an_msr_that_nobody_serves(access: bytes) -> None:
    """An MSR of KVM's block that is none of the engine's is #GP in the guest, and no error here."""
    assert run(on_gp(access + DONE, out(EXIT_PORT, 13)))[0] == 13


@pytest.mark.row("K-10")
@pytest.mark.parametrize(
    ("value", "publishes"), [(DATA | 1, 1000), (DATA, 0), (1 << 63 | 1, 0), ((1 << 64) - 1, 0), (0xFFF001, 1000)]
)
def test_a_flood_of_msr_writes(value: int, publishes: int) -> None:
    """A thousand registrations of a page, wherever it is, harm nobody; each publishes it where it can."""
    wrmsr = write_msr(SYSTEM_TIME, value)
    loop = b"\xbd\xe8\x03" + wrmsr + b"\x4d\x75" + bytes([0x100 - len(wrmsr) - 3])  # mov $1000, %bp; ...; dec; jnz
    with Machine(loop + DONE, memory_bytes=1 << 24, tick_interval_s=None) as machine:
        machine.start()
        assert machine.wait(HANG_S) == 0
        written = {gpa: machine.memory.read(gpa, 4) for gpa in (DATA, 0xFFF000)}
    assert written[value & ~1 if publishes else DATA] == (2 * publishes).to_bytes(4, "little")
    assert sum(map(any, written.values())) == (publishes > 0)


# Clocks and images


@pytest.mark.row("K-10", "K-19")
@pytest.mark.parametrize("msr", [SYSTEM_TIME, 0x12])
@pytest.mark.parametrize("clock", CLOCKS)
def test_whoever_is_asked_serves_the_clock(clock: Literal["engine", "kernel"], msr: int) -> None:
    """The page that the guest registers is the engine's or the kernel's, by the old MSR as by the new one."""
    with Machine(write_msr(msr, DATA | 1) + DONE, clock=clock) as machine:
        machine.start()
        assert machine.wait(HANG_S) == 0
        version = int.from_bytes(machine.memory.read(DATA, 4), "little")
        assert version > 0
        assert version % 2 == 0
        assert (machine.clock is not None and machine.clock.page(0) is not None) == (clock == "engine")
        assert (machine.vcpus[0].get_msr(msr) != 0) == (clock == "kernel")


@pytest.mark.row("K-12")
@pytest.mark.parametrize("clock", CLOCKS)
def test_a_multiboot_image_on_two_vcpus(clock: Literal["engine", "kernel"]) -> None:
    """clockprobe starts its other vCPU by itself, reads both pages, survives a pause and ends."""
    with probe_machine(clock, 2) as machine:
        machine.start()
        wait_until_reading(machine)
        machine.pause()
        machine.resume()
        records = finish(machine)
        assert [record.state for record in records] == [State.DONE, State.DONE]
        assert not any(failures(records).values())
        versions = [machine.memory.read(time_page_address(vcpu), 4) for vcpu in range(2)]
        assert all(int.from_bytes(version, "little") % 2 == 0 and any(version) for version in versions)
        assert "cpus=2" in machine.console


# What cannot be made, and what is left


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"image": b""}, ImageError),
        ({"image": b"\x7fELF"}, ImageError),
        ({"memory_bytes": 0}, ConfigError),
        ({"memory_bytes": 4097}, ConfigError),
        ({"memory_bytes": 1 << 40}, ConfigError),
        ({"memory_bytes": 4096}, ImageError),
        ({"vcpus": 0}, ConfigError),
        ({"vcpus": 1 << 20}, ConfigError),
        ({"clock": "sundial"}, ConfigError),
        ({"clock": "kernel", "tsc_offset": 1}, ConfigError),
        ({"provider": "sundial"}, ConfigError),
        ({"tsc_offsett": 1}, ConfigError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_machine_that_cannot_be_made_leaves_nothing(options: dict[str, Any], error: type[PvclockError]) -> None:
    """At whatever stage it fails: a typed error, and no descriptor, thread or memory stays."""
    before = held()
    with pytest.raises(error):
        Machine(**({"image": HLT} | options))
    assert held() == before


def test_no_device_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without KVM the constructor says so before it makes anything."""
    before = held()
    monkeypatch.setattr("pvclock.kvm.capabilities.open_kvm.__defaults__", ("/nonexistent/kvm",))
    with pytest.raises(KvmUnavailable):
        Machine(HLT)
    assert held() == before


def test_a_taken_kick_signal_leaves_nothing() -> None:
    """The last thing that can fail before the image is loaded takes everything with it."""
    kick = signal.SIGRTMIN + 2
    was = signal.signal(kick, lambda *_: None)
    before = held()
    try:
        with pytest.raises(StateError, match="choose another kick signal"):
            Machine(HLT)
    finally:
        signal.signal(kick, was)
    assert held() == before


def test_fifty_machines_leave_nothing() -> None:
    """Run, paused, never started, given up: whatever became of them, all that they held is back."""
    before = held()
    for number in range(50):
        with Machine(SPIN if number % 3 else DONE, vcpus=1 + number % 2, clock=CLOCKS[number % 2]) as machine:
            if number % 5:
                machine.start()
            if number % 7 == 0:
                machine.pause()
            machine.console  # noqa: B018  # as somebody who watches it
        machine.close()
    assert held() == before


def test_memory_outlives_the_machine_while_somebody_looks() -> None:
    """close() says that a view of the RAM is still out, and gives all else back; the view stays readable."""
    before = held()
    machine = Machine(HLT)
    view = memoryview(machine._hardware.ram.buffer)
    with pytest.raises(BufferError):
        machine.close()
    assert [name for name in held().descriptors if name.startswith(("/dev/kvm", "anon_inode:kvm"))] == []
    assert view[IMAGE] == HLT[0]
    view.release()
    machine._hardware.ram.close()
    assert held() == before


def test_a_forked_child_does_not_map_the_ram() -> None:
    """A fork leaves the guest's pages with the parent alone."""
    ram = Ram(1 << 16)
    try:
        assert ram_mappings() == 1
        child = os.fork()
        if child == 0:
            os._exit(ram_mappings(Path("/proc/self")))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        ram.close()
        ram.close()


# Held or not


@pytest.mark.row("E9")
@pytest.mark.parametrize("unslaved", [False, True])
def test_a_backend_says_whether_its_vcpus_are_held(unslaved: bool) -> None:
    """They are before a run, while paused and after the end, not by quiesce() alone; execution time asks inside."""
    with Machine(SPIN, vcpus=2) as machine:
        assert machine.clock is not None
        backend = machine.clock.backend
        held_by = ExecutionTimeBackend(backend, native=False).vcpus_are_out if unslaved else backend.vcpus_are_out
        seen = [held_by()]
        for step in (machine.start, machine.pause, machine.resume, machine.stop):
            step()
            with machine.runner.quiesce():
                seen.append(held_by())
        assert seen == [True, False, True, False, True]


@pytest.mark.row("E9")
@pytest.mark.parametrize("backend", [SimulatedBackend(10**9), HostBackend(10**9)])
def test_where_the_vmm_answers_for_its_vcpus(backend: SimulatedBackend | HostBackend) -> None:
    """A backend without vCPUs does not know."""
    assert backend.vcpus_are_out() is None


@pytest.mark.row("E1")
@pytest.mark.parametrize("policy", ["freeze", "advance"])
def test_resume_leaves_the_policy_to_the_clock(policy: str) -> None:
    """resume() settles by the clock's own policy, and by another one only if it is named."""
    with Machine(SPIN) as machine:
        clock = machine.clock
        assert clock is not None
        clock.policy = policy
        machine.pause()
        machine.resume()
        machine.pause()
        machine.resume("slew")
        resumed = [event for event in clock.events.read().events if event.kind == "resume"]
        assert [event.policy for event in resumed] == [policy, "slew"]
        assert [event.jump_ns > 0 for event in resumed] == [policy == "advance", False]


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize(("call", "meddler"), [("pause", "resume"), ("resume", "pause")])
def test_pause_and_resume_do_not_mix(call: str, meddler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume() that comes within pause(), or the reverse, comes after it, and clock and vCPUs agree."""
    with Machine(SPIN) as machine:
        assert machine.clock is not None
        machine.start()
        if call == "resume":
            machine.pause()
        of_the_clock = getattr(machine.clock, call)
        thread = threading.Thread(target=getattr(machine, meddler))

        def meddled(*arguments: object) -> None:
            monkeypatch.undo()
            if call == "resume":
                of_the_clock(*arguments)
            thread.start()
            thread.join(0.5)  # whether it gets through or has to wait
            if call == "pause":
                of_the_clock(*arguments)

        monkeypatch.setattr(machine.clock, call, meddled)
        getattr(machine, call)()
        thread.join(HANG_S)
        assert machine.clock.is_paused == machine.runner.gate.keeps_all_out() == (meddler == "pause")


@pytest.mark.row("E1", "E15")
def test_resume_records_the_policy_in_the_callers_words() -> None:
    """A machine hands the words on as they were given, not as pvclock would write them."""
    with Machine(SPIN) as machine:
        assert machine.clock is not None
        machine.start()
        machine.pause()
        machine.resume("advance:max_ns=007")
        (resumed,) = [event for event in machine.clock.events.read().events if event.kind == "resume"]
    assert resumed.policy == "advance:max_ns=007"
