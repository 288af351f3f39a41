"""pvclock: the guest-time engine for virtual machine monitors.

A `GuestClock` keeps one VM's time exactly and publishes it to the guest; `ClockScale` is the arithmetic, `GuestMemory`
the guest's RAM, a `Backend` the host's time.  Virtual machines on /dev/kvm are in `pvclock.machine`.

Names load on first use, so `import pvclock` alone costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module as _import_module

__version__ = "0.1.0"
"""The package's version; pyproject.toml reads it from here."""

TYPE_CHECKING = False  # type checkers know the name; importing typing would dominate this module's cost
if TYPE_CHECKING:
    from pvclock._counter import read_tsc as read_tsc
    from pvclock._memory import GuestMemory as GuestMemory
    from pvclock._scale import ClockScale as ClockScale
    from pvclock._scale import time_scale as time_scale
    from pvclock._scale import tsc_ratio as tsc_ratio
    from pvclock.clock.guest_clock import GuestClock as GuestClock
    from pvclock.clock.ticker import Ticker as Ticker
    from pvclock.clock.timer_thread import TimerThread as TimerThread
    from pvclock.errors import ConfigError as ConfigError
    from pvclock.errors import GuestAddressError as GuestAddressError
    from pvclock.errors import GuestCrashed as GuestCrashed
    from pvclock.errors import GuestPanicked as GuestPanicked
    from pvclock.errors import ImageError as ImageError
    from pvclock.errors import KvmError as KvmError
    from pvclock.errors import KvmUnavailable as KvmUnavailable
    from pvclock.errors import MissingCapability as MissingCapability
    from pvclock.errors import MsrFault as MsrFault
    from pvclock.errors import PvclockError as PvclockError
    from pvclock.errors import RangeError as RangeError
    from pvclock.errors import StateError as StateError
    from pvclock.errors import StateFileError as StateFileError
    from pvclock.errors import TscOffsetNotHonoured as TscOffsetNotHonoured
    from pvclock.errors import WrongType as WrongType
    from pvclock.host.backend import Backend as Backend
    from pvclock.host.execution_time import ExecutionTimeBackend as ExecutionTimeBackend
    from pvclock.host.simulated import SimulatedBackend as SimulatedBackend
    from pvclock.host.this_host import HostBackend as HostBackend
    from pvclock.machine import Machine as Machine
    from pvclock.machine.cpuid import guest_cpuid as guest_cpuid
    from pvclock.machine.cpuid import set_guest_cpuid as set_guest_cpuid
    from pvclock.msr_ranges import MsrRange as MsrRange
    from pvclock.providers.guest_interface import GuestInterface as GuestInterface
    from pvclock.providers.interface import CpuidLeaf as CpuidLeaf
    from pvclock.providers.interface import HypercallRegisters as HypercallRegisters
    from pvclock.providers.interface import HypercallResult as HypercallResult
    from pvclock.providers.interface import Status as Status
    from pvclock.providers.kvm import KvmFeature as KvmFeature
    from pvclock.quantities import Gpa as Gpa
    from pvclock.quantities import GuestNs as GuestNs
    from pvclock.quantities import GuestTsc as GuestTsc
    from pvclock.quantities import HostTsc as HostTsc
    from pvclock.quantities import RefNs as RefNs
    from pvclock.readings import ClockLine as ClockLine
    from pvclock.readings import Reading as Reading
    from pvclock.readings import Reference as Reference
    from pvclock.readings import Sample as Sample
    from pvclock.readings import TimeInfo as TimeInfo
    from pvclock.timekeeping.timers import Timers as Timers
    from pvclock.tsc.vcpu_tsc import VcpuTsc as VcpuTsc

_HOME = {
    "pvclock._scale": ("ClockScale", "time_scale", "tsc_ratio"),
    "pvclock._memory": ("GuestMemory",),
    "pvclock._counter": ("read_tsc",),
    "pvclock.host.backend": ("Backend",),
    "pvclock.host.simulated": ("SimulatedBackend",),
    "pvclock.host.this_host": ("HostBackend",),
    "pvclock.errors": (
        "ConfigError",
        "GuestAddressError",
        "GuestCrashed",
        "GuestPanicked",
        "ImageError",
        "KvmError",
        "KvmUnavailable",
        "MissingCapability",
        "MsrFault",
        "PvclockError",
        "RangeError",
        "StateError",
        "StateFileError",
        "TscOffsetNotHonoured",
        "WrongType",
    ),
    "pvclock.clock.guest_clock": ("GuestClock",),
    "pvclock.machine": ("Machine",),
    "pvclock.machine.cpuid": ("guest_cpuid", "set_guest_cpuid"),
    "pvclock.msr_ranges": ("MsrRange",),
    "pvclock.providers.guest_interface": ("GuestInterface",),
    "pvclock.providers.interface": ("CpuidLeaf", "HypercallRegisters", "HypercallResult", "Status"),
    "pvclock.providers.kvm": ("KvmFeature",),
    "pvclock.quantities": ("Gpa", "GuestNs", "GuestTsc", "HostTsc", "RefNs"),
    "pvclock.readings": ("ClockLine", "Reading", "Reference", "Sample", "TimeInfo"),
    "pvclock.clock.ticker": ("Ticker",),
    "pvclock.clock.timer_thread": ("TimerThread",),
    "pvclock.timekeeping.timers": ("Timers",),
    "pvclock.tsc.vcpu_tsc": ("VcpuTsc",),
    "pvclock.host.execution_time": ("ExecutionTimeBackend",),
}
_HOME_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_HOME_OF, "get_include"]  # type checkers take the imports above: tests/test_layering.py compares both


def get_include() -> str:
    """Path of the folder with pvclock's C headers, for a compiler's -I."""
    return f"{__path__[0]}/include"


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pvclock' has no attribute {name!r}")
    value = getattr(_import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
