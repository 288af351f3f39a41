"""Virtual machines: a `Machine` is KVM, a boot image and a GuestClock."""

from pvclock.machine.machine import CONSOLE_PORT, EXIT_PORT, Machine

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Machine"]
