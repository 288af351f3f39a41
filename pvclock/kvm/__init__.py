"""Virtual CPUs on /dev/kvm: wrappers of its ioctls, what a host can do, typed exits, the threads that run vCPUs.

It knows no provider and no clock policy: exits go to a handler that it is given.
"""

from pvclock.kvm._ioctls import Kvm, Vcpu, Vm
from pvclock.kvm.backend import KvmBackend
from pvclock.kvm.capabilities import open_kvm
from pvclock.kvm.runner import Runner

__all__ = ["Kvm", "KvmBackend", "Runner", "Vcpu", "Vm", "open_kvm"]
