from collections.abc import Callable, Iterable
from threading import RLock
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, final

from pvclock._memory import GuestMemory

__pyx_capi__: dict[str, object]  # C functions that other modules of ours import

_State = TypeVar("_State")
_Result = TypeVar("_Result")
_Returned = TypeVar("_Returned")

@final
class Transaction:
    @property
    def lock(self) -> RLock: ...
    @property
    def count(self) -> int: ...
    def __new__(cls, memory: GuestMemory, after: Callable[[], object]) -> Self: ...
    def take_over(self, token: object) -> object: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]: ...

@final
class Turns:
    def take(self) -> Turn: ...

@final
class Turn:
    def __new__(cls, turns: Turns) -> Self: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *exc_info: object) -> None: ...

class _Log(Protocol):
    @property
    def last(self) -> int: ...
    def record(self, event: Any, /) -> object: ...  # noqa: ANN401  # a log's own event
    def read(self, since: int, /) -> Any: ...  # noqa: ANN401  # a log's own batch

def commit(
    publish: Callable[[], _Returned],
    change: Callable[[_Returned], tuple[_State, Iterable[object]]],
    take: Callable[[_State], object],
    events: _Log | None = None,
    told: Callable[[_State], object] | None = None,
) -> None: ...
def attempt(
    begin: Callable[[], object], undo: Callable[[], object], operation: Callable[[Callable[[], None]], _Result]
) -> _Result: ...
def finish(operation: Callable[[], _Result], end: Callable[[], object]) -> _Result: ...
