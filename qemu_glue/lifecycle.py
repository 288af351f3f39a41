"""A guest's clock as its VMM stops, continues, resets, saves and loads it: engine, kernel and QEMU side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pvclock.commands.screen import Screen
from pvclock.meter.comparison import Check
from pvclock.meter.lifecycle.comparison import compare_operation
from pvclock.meter.lifecycle.observe import observe_operation
from pvclock.meter.lifecycle.operations import Kind, Operation, operations
from pvclock.meter.machine_guest import MachineGuest
from qemu_glue.guest import qemu_guest

__all__ = ["OperationChecks", "cross_check_lifecycle"]

NOT_SAVED: Final = "our machine saves the engine's clock only, so there is nothing to compare"


class OperationChecks(NamedTuple):
    """The rows of one operation."""

    operation: str
    checks: list[Check]


def cross_check_lifecycle(
    vcpus: int, screen: Screen, script: Sequence[Operation] | None = None
) -> Iterator[OperationChecks]:
    """Each operation of `script` on guests with `vcpus` vCPUs of the engine, the kernel and QEMU, one after the other.

    script: operations() if not given.  Progress goes to `screen`.  All errors of starting machines and QEMUs and of
    what is done to them; nothing is left running then.
    """
    for operation in operations() if script is None else script:
        yield OperationChecks(operation.name, _cross_check(operation, vcpus, screen))


def _cross_check(operation: Operation, vcpus: int, screen: Screen) -> list[Check]:
    with screen.waiting(f"{operation.name}: the engine's clock"):
        engine = observe_operation(lambda: MachineGuest("engine", vcpus), operation)
    features = engine.before.records[0].features
    with screen.waiting(f"{operation.name}: QEMU's clock"):
        qemu = observe_operation(lambda: qemu_guest(features, vcpus), operation)
    if operation.kind is Kind.LOAD:
        return compare_operation(operation.kind, [engine, qemu], {"kernel": NOT_SAVED})
    with screen.waiting(f"{operation.name}: the kernel's clock"):
        kernel = observe_operation(lambda: MachineGuest("kernel", vcpus), operation)
    return compare_operation(operation.kind, [engine, kernel, qemu], {})
