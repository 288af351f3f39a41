"""The devices that every machine has on its bus."""

from pvclock.machine.devices.console import CONSOLE_PORT, Console
from pvclock.machine.devices.exit_port import EXIT_PORT, ExitPort

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Console", "ExitPort"]
