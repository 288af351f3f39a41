from collections.abc import Callable, Iterable
from threading import RLock
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, final

from pvclock._memory import GuestMemory
from pvclock.quantities import HostTsc

_State = TypeVar("_State")

@final
class Transaction:
    @property
    def lock(self) -> RLock: ...
    def __new__(cls, memory: GuestMemory, after: Callable[[], object]) -> Self: ...
    def take_over(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]: ...

class _Log(Protocol):
    @property
    def last(self) -> int: ...
    def record(self, event: Any, /) -> object: ...

def commit(
    publish: Callable[[], int | None],
    change: Callable[[HostTsc], tuple[_State, Iterable[object]]],
    take: Callable[[_State], object],
    events: _Log,
) -> None: ...
