from collections.abc import Callable
from threading import RLock
from types import TracebackType
from typing import Self, final

from pvclock._memory import GuestMemory

@final
class Transaction:
    @property
    def lock(self) -> RLock: ...
    def __new__(cls, memory: GuestMemory, after: Callable[[], object]) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> bool: ...
