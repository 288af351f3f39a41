"""Machines for tests."""

from __future__ import annotations

from typing import Any

from pvclock.boot import BootSource
from pvclock.machine import Machine
from pvclock.meter.machine_guest import wait_until_reading
from pvclock.payloads import clockprobe

__all__ = ["made"]


def made(image: bytes | BootSource | None, **options: Any) -> Machine:  # noqa: ANN401  # Machine's
    """A Machine with `image`; or with clockprobe, which runs and reads its clock.  Errors of Machine."""
    if image is not None:
        return Machine(image, **options)
    machine = Machine(clockprobe(), cmdline=f"cpus={options.get('vcpus', 1)}", **options)
    try:
        machine.start()
        wait_until_reading(machine)
    except BaseException:
        machine.close()
        raise
    return machine
