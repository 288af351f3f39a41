"""How a watch begins: at once, or as soon as there is what it wants, or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from pvclock.errors import PagesNotFound, VmNotObservable
from qemu_glue import NotKvm, QmpFailed
from qemu_glue.watch.beginning import Interrupted, Patience
from qemu_glue.watch.interrupts import Interrupts
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E3")


def makes(*results: int | Exception) -> Callable[[], int]:
    """Something that comes to these, one after the other."""
    left = list(results)

    def make() -> int:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return make


NOT_YET = [QmpFailed("connect", "no file"), VmNotObservable(1, "no vCPUs yet"), PagesNotFound(0, "", "not booted")]


def test_it_waits_for_what_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a socket, a process, pages, and then for those that are surely the guest's; other errors are errors."""
    monkeypatch.setattr("qemu_glue.watch.beginning.RETRY_S", 0)
    with Interrupts() as interrupts:
        patience = Patience(HANG_S, interrupts)
        assert patience.have(makes(*NOT_YET, 1, 2, 3), lambda made: made == 2) == 2
        with pytest.raises(NotKvm):
            patience.have(makes(NotKvm(), 1))


def test_it_does_not_wait_for_ever() -> None:
    """Nor at all, unless it is asked for: then the first try counts, whatever it brings."""
    with Interrupts() as interrupts:
        patience = Patience(0, interrupts)
        assert patience.have(makes(1), lambda made: made == 2) == 1
        for error in NOT_YET:
            with pytest.raises(type(error)):
                patience.have(makes(error, 1))


def test_ctrl_c_ends_it() -> None:
    """Between two tries, and, where it is asked, amid one."""
    with Interrupts() as interrupts:
        patience = Patience(HANG_S, interrupts)
        patience.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            patience.check()
        with pytest.raises(Interrupted):
            patience.have(makes(*NOT_YET))
