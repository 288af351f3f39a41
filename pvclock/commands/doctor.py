"""Say what works on this host, what to type next, and what to install or enable for the rest.

Exit status 1 if something is missing that is needed to run guests.

With --guest: what is wrong with the clock of the Linux guest that this is, by a measurement on all its CPUs.  It needs
no rights.  Exit status 1 if the clock is wrong or a budget is broken, 2 if that is undecided.

With --machine: what a guest would see of time in the machine that `pvclock run` makes with the same options, before it
runs.  Exit status 1 if that would be wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Final, NamedTuple

from rich.text import Text

from pvclock.commands import doctor_guest, doctor_machine, find_command
from pvclock.commands.guest_next import NextCommand
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table, verdict
from pvclock.errors import ConfigError, KvmError, LabError
from pvclock.host.linux import cpu_flags, host_clocksource
from pvclock.host.this_host import measure_tsc_hz
from pvclock.host.vmm_process import running_vms
from pvclock.kvm._system import Kvm
from pvclock.kvm.capabilities import OPTIONAL, REQUIRED, open_kvm
from pvclock.kvm.cpuid_probe import probe_cpuid
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets
from pvclock.lab.kernel import require_kernel
from pvclock.lab.tools import install_commands, require_tools
from pvclock.meter.figure import Figure

__all__ = ["EXAMPLES", "Finding", "add_arguments", "examine", "next_command", "run", "works"]

EXAMPLES: Final = """\
  pvclock doctor                    what works, what to type next, and a table
  pvclock doctor | grep KVM_CAP     a row is one line in a pipe
  pvclock doctor --guest            inside a VM: what is wrong with its clock
  pvclock doctor --machine          what a guest of run will see of time
  pvclock doctor --guest --seconds 60 --max-warp 200ns --max-drift 100ppb"""

CPUS: Final = "--cpus"
"""Goes with --guest, and with --machine."""

NAMES: Final = {
    "engine_clock": "engine clock",
    "kvm_guests": "KVM guests",
    "crosscheck": "QEMU cross-check",
    "lab": "lab",
}


class Finding(NamedTuple):
    """One thing that was examined.  `needed`: pvclock cannot run guests without it.  `advice`: what to do if not ok."""

    name: str
    ok: bool
    found: Figure
    needed: bool = False
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--guest", action="store_true", help="measure the clock of the guest that this is, and judge it"
    )
    doctor_guest.add_arguments(parser)
    parser.add_argument(
        "--machine", action="store_true", help="judge the machine of `pvclock run` with these options, and --cpus N"
    )
    doctor_machine.add_arguments(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show what works, the next command and the findings; or the verdict on this guest's clock, or on a machine's."""
    of_guest, of_machine = doctor_guest.options_given(arguments), doctor_machine.options_given(arguments)
    if arguments.guest and arguments.machine:
        raise ConfigError("--guest is this guest, and --machine one that does not run yet: give one of them")
    if of_machine and not arguments.machine:
        raise ConfigError(f"{of_machine[0]} goes with --machine")
    if arguments.machine:
        of_guest = [option for option in of_guest if option != CPUS]
    if of_guest and not arguments.guest:
        raise ConfigError(f"{of_guest[0]} goes with --guest{' and --machine' * (of_guest[0] == CPUS)}")
    if arguments.guest:
        return doctor_guest.run(arguments, screen)
    return doctor_machine.run(arguments, screen) if arguments.machine else _host_outcome(screen)


def _host_outcome(screen: Screen) -> Outcome:
    findings = list(examine())
    working = works(findings)
    command, why = next_command(working)
    also = list(_also())
    screen.show(_summary(working), f"Type next:  {command}  ({why})")
    screen.show(*(f"And:        {each.command}  ({each.why})" for each in also))
    screen.show(_table(findings))
    return Outcome(
        not any(finding.needed and not finding.ok for finding in findings),
        {"works": working, "next": {"command": command, "why": why}, "also": also, "findings": findings},
    )


def works(findings: list[Finding]) -> dict[str, bool]:
    """Which of pvclock's surfaces can run here."""
    ok = {finding.name: finding.ok for finding in findings}
    return {
        "engine_clock": ok["processor"],
        "kvm_guests": ok["processor"] and ok["/dev/kvm"],
        "crosscheck": ok["processor"] and ok["/dev/kvm"] and ok["QEMU"],
        "lab": ok["processor"] and ok["lab"],
    }


def next_command(working: Mapping[str, bool]) -> tuple[str, str]:
    """The command that is of most use on such a host, and what it does."""
    if working["kvm_guests"]:
        return "pvclock demo", "a guest's clock at work, half a minute"
    if working["lab"]:
        return "pvclock lab -- pvclock demo", "the same in a KVM under emulation, a minute"
    commands = install_commands()
    if commands and shutil.which("apt-get") and working["engine_clock"]:
        sudo = "sudo " if os.geteuid() and commands[0].startswith("apt-get") else ""
        return sudo + " && ".join(commands), "for the lab, which has a KVM of its own"
    return "pvclock demo", "the engine's clock in this process, without a guest"


def _also() -> Iterator[NextCommand]:
    """Commands for what this host is beside a host: a guest itself, and one that runs guests."""
    if "hypervisor" in cpu_flags():
        yield NextCommand("pvclock doctor --guest", "this is a VM itself: what is wrong with its clock")
    if find_command("watch") and running_vms():
        yield NextCommand("pvclock watch --pid", "a VM runs here: the steps and the rate of its clock, from outside")


def _summary(working: Mapping[str, bool]) -> str:
    here = ", ".join(NAMES[name] for name, ok in working.items() if ok) or "nothing"
    not_here = ", ".join(NAMES[name] for name, ok in working.items() if not ok)
    return f"Works here: {here}." + (f"  Not: {not_here}." if not_here else "")


def examine() -> Iterator[Finding]:
    """Examine this host, row by row."""
    for finding in _findings():
        yield finding._replace(advice="") if finding.ok else finding


def _findings() -> Iterator[Finding]:
    """The rows, with advice on each that may need it."""
    machine = platform.machine()
    yield Finding("processor", machine == "x86_64", Figure(machine), True, "pvclock is for x86-64")
    yield Finding("kernel", True, Figure(platform.release()))
    yield _clocksource()
    tsc_hz = measure_tsc_hz()
    yield Finding("TSC frequency", True, Figure(f"{tsc_hz / 1e6:.3f} MHz, measured", {"tsc_hz": tsc_hz}))
    try:
        kvm = open_kvm()
    except KvmError as error:
        advice = "without it, only in-process clocks run; pvclock lab has a KVM of its own"
        yield Finding("/dev/kvm", False, Figure(str(error.strerror), {"errno": error.errno}), True, advice)
    else:
        with closing(kvm):
            yield from _kvm(kvm)
    yield _qemu()
    yield _lab()


def _clocksource() -> Finding:
    found = host_clocksource()
    advice = "the host does not trust its TSCs: pages go without TSC_STABLE, and guests clamp their readings"
    return Finding("host clocksource", found == "tsc", Figure(found), False, advice)


def _kvm(kvm: Kvm) -> Iterator[Finding]:
    version = kvm.get_api_version()
    yield Finding("/dev/kvm", True, Figure(f"API {version}", {"api_version": version}), True)
    for capability in (*REQUIRED, *OPTIONAL):
        value = kvm.check_extension(capability.name)
        needed = capability in REQUIRED
        advice = "a newer kernel or other hardware may have it"
        found = Figure(f"{value}, {capability.purpose}", {"value": value})
        yield Finding(capability.name, value != 0, found, needed, advice)
    with closing(kvm.create_vm()) as vm, closing(vm.create_vcpu(0)) as vcpu:
        khz = vcpu.get_tsc_khz()
    yield Finding("guest TSC frequency", True, Figure(f"{khz / 1e3:.3f} MHz", {"tsc_hz": khz * 1000}))
    offsets = probe_tsc_offsets(kvm)
    advice = "VMX and SVM hosts on clocksource tsc have offsets of the VMM's own; so has pvclock lab"
    yield Finding("guest TSC offset", offsets is TscOffsets.HONOURED, Figure(str(offsets)), False, advice)
    cpuid = probe_cpuid(kvm)
    advice = "these features cannot be hidden from a guest here; VMX and SVM hosts can hide them; so can pvclock lab"
    bits = {f"{leaf:#x}_{register}": ignored for (leaf, register), ignored in cpuid.ignored.items()}
    yield Finding("guest CPUID", cpuid.is_honoured, Figure(str(cpuid), {"ignored": bits}), False, advice)


def _qemu() -> Finding:
    glue = find_command("crosscheck")
    lacking = "qemu_glue is not installed" if glue is None else glue.obstacle()
    found = shutil.which("qemu-system-x86_64") or "not found"
    return Finding("QEMU", lacking is None, Figure(found), False, f"to check against QEMU: {lacking}")


def _lab() -> Finding:
    try:
        require_tools()
        require_kernel()
    except LabError as lacking:
        return Finding("lab", False, Figure("cannot run"), False, str(lacking))
    return Finding("lab", True, Figure("can run"))


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "found, and what to do")
    for finding in findings:
        told = Text(finding.found.text)
        if not finding.ok:
            told.append(f"\n{finding.advice}", "yellow")
        table.add_row(verdict(finding.ok, warning=not finding.needed), finding.name, told)
    return table
