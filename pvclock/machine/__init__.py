"""Virtual machines: a `Machine` is KVM, a boot source, a clock, and devices on a bus."""

from pvclock.machine.bus import Bus, Device
from pvclock.machine.devices import CONSOLE_PORT, EXIT_PORT
from pvclock.machine.exits import Ending
from pvclock.machine.machine import Machine
from pvclock.machine.run_state import RunState, RunStates

__all__ = ["CONSOLE_PORT", "EXIT_PORT", "Bus", "Device", "Ending", "Machine", "RunState", "RunStates"]
