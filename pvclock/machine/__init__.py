"""Virtual machines: a `Machine` is KVM, a boot image and a GuestClock."""

from pvclock.machine.exits import CONSOLE_PORT, EXIT_PORT
from pvclock.machine.machine import Machine

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Machine"]
