"""Every ioctl on descriptors that are none of KVM's: an error with its name and errno, and nothing worse."""

import errno
import os

import pytest

from pvclock.errors import KvmError, StateError
from pvclock.kvm import Kvm
from tests.kvm.guests import HLT, bare_vm
from tests.kvm.kvm_calls import KVM_CALLS, VCPU_CALLS, VM_CALLS, refused

pytestmark = pytest.mark.kvm


@pytest.mark.row("E13")
@pytest.mark.parametrize("call", KVM_CALLS)
def test_what_is_not_kvm_says_enotty(call: str) -> None:
    """A system ioctl on a device that is not KVM's is an error with the ioctl's name."""
    with Kvm(os.devnull) as kvm:
        assert refused(call, lambda: KVM_CALLS[call](kvm)) == errno.ENOTTY


@pytest.mark.row("E13")
@pytest.mark.parametrize("call", KVM_CALLS)
def test_closed_kvm_says_ebadf(call: str) -> None:
    """A system ioctl after close() is an error with the ioctl's name."""
    kvm = Kvm()
    kvm.close()
    kvm.close()
    assert kvm.fileno() == -1
    assert refused(call, lambda: KVM_CALLS[call](kvm)) == errno.EBADF


@pytest.mark.row("E13")
@pytest.mark.parametrize("call", VM_CALLS)
def test_closed_vm_says_ebadf(call: str) -> None:
    """A VM ioctl after close() is an error with the ioctl's name."""
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vm.close()
        assert refused(call, lambda: VM_CALLS[call](vm)) == errno.EBADF


@pytest.mark.row("E13")
@pytest.mark.parametrize("call", sorted(VCPU_CALLS.keys() - {"KVM_RUN"}))
def test_closed_vcpu_says_ebadf(call: str) -> None:
    """A vCPU ioctl after close() is an error with the ioctl's name."""
    with bare_vm(HLT) as bare:
        bare.vcpus[0].close()
        assert refused(call, lambda: VCPU_CALLS[call](bare.vcpus[0])) == errno.EBADF


@pytest.mark.row("E9")
def test_closed_vcpu_does_not_run_or_answer() -> None:
    """What needs kvm_run is a StateError after close(), and a late request_exit() does nothing."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.close()
        vcpu.request_exit()
        for action in (vcpu.run, lambda: vcpu.complete_io(b"\0"), lambda: vcpu.complete_mmio(b"\0"), vcpu.complete_msr):
            with pytest.raises(StateError):
                action()
        assert vcpu.take_coalesced() == ()


@pytest.mark.row("E13")
def test_a_path_that_does_not_open_is_named() -> None:
    """The error of open() carries the path and the errno."""
    with pytest.raises(KvmError, match="open /nonexistent/kvm: ENOENT") as caught:
        Kvm("/nonexistent/kvm")
    assert caught.value.errno == errno.ENOENT
