"""Virtual CPUs on /dev/kvm: wrappers of its ioctls, what a host can do, typed exits, the threads that run vCPUs.

It knows no provider and no clock policy: exits go to a handler that it is given.
"""

from pvclock.kvm._system import Kvm
from pvclock.kvm._vcpu import Vcpu
from pvclock.kvm._vm import Vm
from pvclock.kvm.backend import KvmBackend, SteeredTscBackend, kvm_backend
from pvclock.kvm.capabilities import open_kvm
from pvclock.kvm.exits import (
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    Mmio,
    MsrExitReason,
    RdmsrExit,
    Shutdown,
    SystemEvent,
    UnknownExit,
    WrmsrExit,
)
from pvclock.kvm.msr_filter import exit_on_msrs
from pvclock.kvm.runner import ExitHandler, Runner
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets

__all__ = [
    "Kvm",
    "Vm",
    "Vcpu",
    "Runner",
    "KvmBackend",
    "SteeredTscBackend",
    "open_kvm",
    "exit_on_msrs",
    "kvm_backend",
    "ExitHandler",
    "Exit",
    "RdmsrExit",
    "WrmsrExit",
    "MsrExitReason",
    "IoIn",
    "IoOut",
    "Mmio",
    "Halt",
    "Shutdown",
    "SystemEvent",
    "FailEntry",
    "InternalError",
    "Interrupted",
    "UnknownExit",
    "TscOffsets",
    "probe_tsc_offsets",
]
