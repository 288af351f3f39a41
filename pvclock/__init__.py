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
    from pvclock._counter import read_tsc
    from pvclock._memory import GuestMemory
    from pvclock._scale import ClockScale, time_scale, tsc_ratio
    from pvclock.clock.guest_clock import GuestClock
    from pvclock.clock.ticker import Ticker
    from pvclock.errors import (
        ConfigError,
        GuestAddressError,
        GuestCrashed,
        ImageError,
        KvmError,
        KvmUnavailable,
        MissingCapability,
        MsrFault,
        PvclockError,
        RangeError,
        StateError,
        StateFileError,
        TscOffsetNotHonoured,
        WrongType,
    )
    from pvclock.host.backend import Backend
    from pvclock.host.execution_time import ExecutionTimeBackend
    from pvclock.host.simulated import SimulatedBackend
    from pvclock.host.this_host import HostBackend
    from pvclock.machine import Machine
    from pvclock.machine.cpuid import guest_cpuid, set_guest_cpuid
    from pvclock.msr_ranges import MsrRange
    from pvclock.providers.guest_interface import GuestInterface
    from pvclock.providers.interface import CpuidLeaf, HypercallRegisters, HypercallResult, Status
    from pvclock.providers.kvm import KvmFeature
    from pvclock.quantities import Gpa, GuestNs, GuestTsc, HostTsc, RefNs
    from pvclock.readings import ClockLine, Reading, Reference, Sample, TimeInfo
    from pvclock.timekeeping.timers import Timers
    from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = [
    "GuestClock",
    "GuestMemory",
    "ClockScale",
    "VcpuTsc",
    "Backend",
    "SimulatedBackend",
    "HostBackend",
    "ExecutionTimeBackend",
    "Reference",
    "Sample",
    "Ticker",
    "Timers",
    "Machine",
    "KvmFeature",
    "GuestInterface",
    "CpuidLeaf",
    "HypercallRegisters",
    "HypercallResult",
    "Status",
    "MsrRange",
    "TimeInfo",
    "Reading",
    "ClockLine",
    "HostTsc",
    "GuestTsc",
    "GuestNs",
    "RefNs",
    "Gpa",
    "PvclockError",
    "WrongType",
    "RangeError",
    "ConfigError",
    "ImageError",
    "GuestAddressError",
    "GuestCrashed",
    "StateError",
    "StateFileError",
    "MsrFault",
    "TscOffsetNotHonoured",
    "KvmError",
    "KvmUnavailable",
    "MissingCapability",
    "read_tsc",
    "time_scale",
    "tsc_ratio",
    "guest_cpuid",
    "set_guest_cpuid",
    "get_include",
]

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
    "pvclock.timekeeping.timers": ("Timers",),
    "pvclock.tsc.vcpu_tsc": ("VcpuTsc",),
    "pvclock.host.execution_time": ("ExecutionTimeBackend",),
}
_HOME_OF = {name: module for module, names in _HOME.items() for name in names}


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
