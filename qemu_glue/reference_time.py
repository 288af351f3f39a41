"""Hyper-V's reference time in a QEMU/KVM, beside the engine's, where the host's KVM has it."""

from __future__ import annotations

import time
from typing import Final

from pvclock import StateError
from pvclock.commands.screen import Screen
from pvclock.kvm import open_kvm
from pvclock.meter.comparison import Check
from pvclock.meter.findings import EXIT_LIMIT_S
from pvclock.meter.reference_time import (
    ReferenceObservation,
    compare_reference_time,
    observe_engine,
    records_of,
    wait_until_reading,
)
from pvclock.payloads import hvprobe, probe
from qemu_glue.peer.cpu_model import FEATURE_BITS
from qemu_glue.peer.launch import Qemu

__all__ = ["cross_check_reference_time", "observe_qemu"]

KVMCLOCK: Final = FEATURE_BITS["kvmclock"] | FEATURE_BITS["kvmclock-stable-bit"]
ENLIGHTENMENTS: Final = ("hv-time", "hv-vpindex")
NO_HYPERV: Final = "QEMU's column: this host's KVM has no Hyper-V (KVM_CAP_HYPERV_TIME); pvclock lab has one that does"


def cross_check_reference_time(vcpus: int, seconds: float, screen: Screen) -> tuple[list[Check], str | None]:
    """All rows, for guests with `vcpus` vCPUs that read for `seconds`, and why QEMU's column is empty; None if not."""
    with screen.waiting("Hyper-V's reference time, the engine's"):
        observed = [observe_engine(vcpus, seconds)]
    if not _kvm_has_hyperv():
        return compare_reference_time(observed), NO_HYPERV
    with screen.waiting("Hyper-V's reference time, QEMU's"):
        observed.append(observe_qemu(vcpus, seconds))
    return compare_reference_time(observed), None


def observe_qemu(vcpus: int, seconds: float) -> ReferenceObservation:
    """KVM's own in a QEMU, beside kvmclock; errors of Qemu, and StateError if the guest ends badly."""
    command = f"cpus={vcpus}"
    with Qemu(hvprobe(), features=KVMCLOCK, vcpus=vcpus, cmdline=command, cpu_flags=ENLIGHTENMENTS) as qemu:

        def has_ended() -> bool:
            """Never without an error: QEMU ends with its guest."""
            qemu.check_running()
            time.sleep(0.001)
            return False

        wait_until_reading(qemu.memory, vcpus, has_ended)
        tsc_hz = qemu.tsc_hz()
        time.sleep(seconds)
        qemu.check_running()
        probe.stop(qemu.memory)
        if qemu.wait(EXIT_LIMIT_S) != probe.EXIT_FINE:
            raise StateError("observe", f"hvprobe ended badly in QEMU, and said {qemu.console.strip()}", "try again")
        return ReferenceObservation("qemu", tsc_hz, records_of(qemu.memory, vcpus))


def _kvm_has_hyperv() -> bool:
    with open_kvm() as kvm:
        return kvm.check_extension("KVM_CAP_HYPERV_TIME") > 0
