"""What the host's KVM is like: tests expect of a host what it can do, and of another that it says so."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pvclock.clock.guest_clock import TSC_STABLE_BIT
from pvclock.host.linux import host_clocksource
from pvclock.kvm import open_kvm
from pvclock.kvm.cpuid_probe import CpuidProbe, probe_cpuid
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets


@pytest.fixture(scope="session")
def tsc_offsets() -> TscOffsets:
    """Return what becomes of TSC offsets on this host."""
    with open_kvm() as kvm:
        return probe_tsc_offsets(kvm)


@pytest.fixture
def offsets_are_honoured(tsc_offsets: TscOffsets) -> None:
    """Skip where a guest's TSC is not as it is set."""
    if tsc_offsets is not TscOffsets.HONOURED:
        pytest.skip("this host's KVM does not honour TSC offsets; `make test-lab` runs it on one that does")


@pytest.fixture
def tsc_is_trusted() -> None:
    """Skip where the host's own TSC is no clock for guests."""
    if host_clocksource() != "tsc":
        pytest.skip("this host's kernel does not trust its TSC; `make test-lab` runs it on one that does")


@pytest.fixture(scope="session")
def cpuid() -> CpuidProbe:
    """Return which CPUID bits this host shows to guests whatever is set."""
    with open_kvm() as kvm:
        return probe_cpuid(kvm)


@pytest.fixture(scope="session")
def stable_bit() -> int:
    """Return the flag that pages have on this host when all vCPUs' TSCs agree: TSC_STABLE, if it trusts its own."""
    return TSC_STABLE_BIT if host_clocksource() == "tsc" else 0


@pytest.fixture(scope="session")
def kvm_serves_coalesced_ports() -> bool:
    """Has this host's KVM a ring for port writes?"""
    with open_kvm() as kvm:
        return bool(kvm.check_extension("KVM_CAP_COALESCED_PIO"))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt; in a shell's background job it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def image(tmp_path: Path) -> Callable[[bytes], str]:
    """Put an image into a file; its path."""

    def write(content: bytes) -> str:
        path = tmp_path / "image"
        path.write_bytes(content)
        return str(path)

    return write
