"""Say what this host can do for guest clocks, and what to install or enable for the rest."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pvclock.backend import host_clocksource, measure_tsc_hz
from pvclock.errors import KvmError
from pvclock.kvm._ioctls import Kvm
from pvclock.kvm.capabilities import OPTIONAL, REQUIRED, open_kvm, value_of
from pvclock.kvm.cpuid_probe import probe_cpuid
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets

__all__ = ["Finding", "add_arguments", "examine", "run"]


class Finding(NamedTuple):
    """One thing looked at.  `needed`: pvclock cannot run guests without it.  `advice`: what to do if it is not ok."""

    name: str
    ok: bool
    found: str
    needed: bool = False
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: none of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if something is missing that is needed to run guests."""
    findings = list(examine())
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        Console().print(_table(findings))
    return int(any(finding.needed and not finding.ok for finding in findings))


def examine() -> Iterator[Finding]:
    """Look at this host, row by row."""
    yield Finding("processor", platform.machine() == "x86_64", platform.machine(), True, "pvclock is for x86-64")
    yield Finding("kernel", True, platform.release())
    yield _clocksource()
    yield Finding("TSC frequency", True, f"{measure_tsc_hz() / 1e6:.3f} MHz, measured")
    try:
        kvm = open_kvm()
    except KvmError as error:
        yield Finding("/dev/kvm", False, str(error.strerror), True, "see there; without it, only in-process clocks run")
    else:
        with closing(kvm):
            yield from _kvm(kvm)
    yield _program("qemu-system-x86_64", "qemu-system-x86", "to check against QEMU")


def _clocksource() -> Finding:
    found = host_clocksource()
    advice = "the host does not trust its TSCs: pages go without TSC_STABLE, and guests clamp their readings"
    return Finding("host clocksource", found == "tsc", found, False, advice)


def _kvm(kvm: Kvm) -> Iterator[Finding]:
    yield Finding("/dev/kvm", True, f"API {kvm.get_api_version()}", True)
    for capability in REQUIRED:
        yield Finding(capability.name, True, f"{value_of(kvm, capability.name)}, {capability.purpose}", True)
    for capability in OPTIONAL:
        value = value_of(kvm, capability.name)
        advice = f"wanted {capability.purpose}; a newer kernel or other hardware may have it"
        yield Finding(capability.name, value != 0, f"{value}, {capability.purpose}", False, advice)
    with closing(kvm.create_vm()) as vm, closing(vm.create_vcpu(0)) as vcpu:
        yield Finding("guest TSC frequency", True, f"{vcpu.get_tsc_khz() / 1e3:.3f} MHz")
    offsets = probe_tsc_offsets(kvm)
    advice = "VMX and SVM hosts on clocksource tsc have offsets of the VMM's own"
    yield Finding("guest TSC offset", offsets is TscOffsets.HONOURED, str(offsets), False, advice)
    cpuid = probe_cpuid(kvm)
    advice = "these features cannot be hidden from a guest here; VMX and SVM hosts can hide them"
    yield Finding("guest CPUID", cpuid.is_honoured, str(cpuid), False, advice)


def _program(name: str, package: str, purpose: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or "not found", False, f"{purpose}: apt-get install {package}")


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        mark = "[green]yes[/]" if finding.ok else "[red]NO[/]" if finding.needed else "[yellow]no[/]"
        table.add_row(mark, finding.name, finding.found, "" if finding.ok else finding.advice)
    return table
