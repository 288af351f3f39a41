from typing import Any, Protocol, Self, final

from pvclock._core import TimePages
from pvclock._guest_budget import GuestBudget
from pvclock._transaction import Transaction
from pvclock.quantities import HostTsc

class _Usual(Protocol):
    def look(self) -> tuple[int, int, int] | None: ...
    def tsc(self, vcpu: int, /) -> Any: ...  # noqa: ANN401  # of a layer above
    def change(self, vcpu: int, before: int, after: int, tsc: HostTsc, /) -> tuple[None, tuple[object, ...]]: ...

class _Log(Protocol):
    @property
    def last(self) -> int: ...
    @property
    def guest_budget(self) -> GuestBudget: ...
    def record(self, event: Any, /) -> object: ...  # noqa: ANN401  # a log's own event
    def read(self, since: int, /) -> Any: ...  # noqa: ANN401  # a log's own batch
    def deliver(self) -> None: ...

@final
class TscWrites:
    def __new__(
        cls,
        changing: Transaction,
        pages: TimePages,
        usual: _Usual,
        events: _Log,
        tsc_hz: int,
        has_adjust: bool,
    ) -> Self: ...
    def serve(self, vcpu: int, index: int, value: int) -> bool: ...

def shows_line_alone(pages: TimePages, vcpu: int) -> bool: ...
def follow_tsc(pages: TimePages, vcpu: int) -> HostTsc: ...
def nothing(_: object) -> None: ...
