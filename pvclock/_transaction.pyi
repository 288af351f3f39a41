from collections.abc import Callable, Iterable
from threading import RLock
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar, final

from pvclock._memory import GuestMemory
from pvclock.quantities import HostTsc

_State = TypeVar("_State")
_Event = TypeVar("_Event")
_EventT_contra = TypeVar("_EventT_contra", contravariant=True)

@final
class Transaction:
    @property
    def lock(self) -> RLock: ...
    def __new__(cls, memory: GuestMemory, after: Callable[[], object]) -> Self: ...
    def take_over(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]: ...  # swallows nothing

class _Log(Protocol[_EventT_contra]):
    @property
    def last(self) -> int: ...
    def record(self, event: _EventT_contra, /) -> object: ...

def commit(
    publish: Callable[[], int | None],
    change: Callable[[HostTsc], tuple[_State, Iterable[_Event]]],
    take: Callable[[_State], object],
    events: _Log[_Event],
) -> None: ...
