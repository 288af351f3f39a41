"""The exception tree: errors keep their numbers, also through pickle."""

from __future__ import annotations

import errno
import pickle

import pytest

from pvclock import errors

EXAMPLES = [
    errors.RangeError("too much"),
    errors.WrongType("vcpu", 1.5, "a whole number"),
    errors.GuestAddressError(0x1000, 8),
    errors.StateError("read", "no page", "register one"),
    errors.MsrFault(0x4B564D01, 5),
    errors.TscOffsetNotHonoured(7),
    errors.GuestCrashed(1, "Shutdown()"),
    errors.GuestPanicked(),
    errors.ProbeRecordError("clocks[0].hz", "0", "whole numbers from 1"),
    errors.ProbeFailed("no TSC"),
    errors.ReportSourceError("watch.jsonl", 17, "a number", "an object"),
    errors.KvmError("KVM_RUN", errno.EINVAL, "try again"),
    errors.KvmUnavailable("open /dev/kvm", errno.EACCES),
    errors.MissingCapability("KVM_CAP_IRQCHIP", "for other vCPUs"),
]


@pytest.mark.row("E13")
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_go_through_pickle(error: errors.PvclockError) -> None:
    """An error from another process is of the same kind, says the same and has the same numbers."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


@pytest.mark.row("E13")
def test_kvm_errors_are_os_errors() -> None:
    """A failed system call can be caught as OSError, with errno, and names the call."""
    with pytest.raises(OSError, match="KVM_RUN: EINVAL") as caught:
        raise errors.KvmError("KVM_RUN", errno.EINVAL, "try again")
    assert caught.value.errno == errno.EINVAL
