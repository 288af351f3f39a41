from typing import Self, final

from typing_extensions import disjoint_base

def read_tsc() -> int: ...

@disjoint_base
class Counter:
    def read(self) -> int: ...
    @property
    def margin_ticks(self) -> int: ...

@final
class HostCounter(Counter):
    def __new__(cls) -> Self: ...

@final
class KernelTimeCounter(Counter):
    def __new__(cls, hz: int) -> Self: ...

@final
class SimulatedCounter(Counter):
    value: int
    def __new__(cls, value: int = 0) -> Self: ...
