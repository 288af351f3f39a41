from typing import final

from pvclock.kvm._fd import Fd
from pvclock.kvm._vcpu import Vcpu

@final
class VcpuStats(Fd):
    def __init__(self, vcpu: Vcpu) -> None: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def read(self, name: str) -> int: ...
