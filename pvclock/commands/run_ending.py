"""How a run of `pvclock run` ended: for people, for JSON, and as the process's exit status."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock.errors import GuestCrashed, GuestPanicked
from pvclock.kvm.exits import InternalError
from pvclock.machine import Ending, Machine
from pvclock.machine.crash import CrashSite
from pvclock.quantities import NS_PER_S

__all__ = [
    "End",
    "ended_by_client",
    "ended_by_guest_time",
    "ended_by_idleness",
    "ended_by_timeout",
    "ended_by_user",
    "find_end",
]

WORDS: Final = {Ending.POWER_OFF: "the guest has powered off", Ending.RESET: "the guest asked for a reset"}
STATUSES: Final = {Ending.POWER_OFF: 0, Ending.RESET: 3, Ending.PANIC: 4}
CRASHED: Final = 5
IDLE: Final = 6
TIMED_OUT: Final = 124
"""As of timeout(1)."""

HINTS: Final = {
    "Unable to mount root fs": "there is no disk: give it a root file system by --initrd FILE, or --shell",
    "No working init found": "its initial RAM disk has no program that it can run as /init",
}
"""What to do about a panic, by what the kernel says."""

COLUMNS: Final = 100
"""Of the registers that a crash shows."""


class Crash(NamedTuple):
    """What a guest crashed by, for JSON: see docs/commands.md.  Bytes are hexadecimal digits."""

    vcpu: int
    reason: str
    suberror: int | None
    fetched: str
    registers: Mapping[str, int] = {}
    linear_rip: int | None = None
    code_before: str = ""
    code: str = ""


class End(NamedTuple):
    """How a run ended.

    ending: an Ending, "crash", "user", "timeout", "guest-time" or "idle".  why: for people.  status: the process's exit
    status.
    """

    ending: str
    why: str
    status: int
    crash: Crash | None = None

    def lines(self) -> str:
        """All that people are told: why, and the registers of a crash."""
        if self.crash is None:
            return self.why
        registers = " ".join(f"{name}={value:#x}" for name, value in self.crash.registers.items())
        return "\n".join([self.why, *textwrap.wrap(registers, COLUMNS, initial_indent="  ", subsequent_indent="  ")])


def ended_by_user() -> End:
    """By the escape key."""
    return End("user", "ended by Ctrl-A x", 0)


def ended_by_client() -> End:
    """By a client of a service, such as QMP's command quit."""
    return End("user", "ended by quit", 0)


def ended_by_timeout(timeout_s: float) -> End:
    """By --timeout."""
    return End("timeout", f"ended by --timeout after {timeout_s:g} s", TIMED_OUT)


def ended_by_guest_time(guest_ns: int) -> End:
    """By --end-at."""
    return End("guest-time", f"ended by --end-at at guest time {guest_ns / NS_PER_S:g} s", 0)


def ended_by_idleness(guest_ns: int) -> End:
    """By time travel, which finds nothing to travel to."""
    why = f"the guest is idle for ever since guest time {guest_ns / NS_PER_S:.3f} s: no timer of it is set"
    return End("idle", f"{why}, and nothing is scheduled", IDLE)


def find_end(machine: Machine, console_panic: str) -> End:
    """How the guest ended its run.

    console_panic: the line by which its kernel told of a panic, if it did: with panic=-1 it says so there, and resets.
    """
    try:
        exit_code = machine.wait()
    except GuestPanicked as panic:
        return End(Ending.PANIC, str(panic), STATUSES[Ending.PANIC])
    except GuestCrashed as crash:
        return End("crash", str(crash), CRASHED, _describe(crash))
    ending = machine.ending
    if ending is Ending.EXIT_CODE or ending is None:
        return End(Ending.EXIT_CODE, f"the guest's exit code is {exit_code}", int(exit_code != 0))
    if ending is Ending.RESET and console_panic:
        return End(Ending.PANIC, _with_hint(f"the guest's kernel panicked: {console_panic}"), STATUSES[Ending.PANIC])
    return End(ending, WORDS[ending], STATUSES[ending])


def _with_hint(why: str) -> str:
    return "; ".join([why, *(hint for said, hint in HINTS.items() if said in why)])


def _describe(crash: GuestCrashed) -> Crash:
    suberror, fetched = None, b""
    if isinstance(crash.reason, InternalError):
        suberror, fetched = crash.reason.suberror, crash.reason.fetched
    described = Crash(crash.vcpu, str(crash.reason), suberror, fetched.hex())
    site = crash.site
    if not isinstance(site, CrashSite):
        return described
    return described._replace(
        registers=site.registers, linear_rip=site.linear, code_before=site.before.hex(), code=site.code.hex()
    )
