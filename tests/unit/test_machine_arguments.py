"""What a Machine says of arguments that are wrong, before it makes anything."""

from __future__ import annotations

from typing import Any

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, Machine, SimulatedBackend, WrongType
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.state.clock_state import ClockState

IMAGE = b"\xf4"


def a_state(vcpus: int) -> ClockState:
    """The saved clock of a VM with so many vCPUs."""
    return GuestClock(GuestMemory(bytearray(1 << 14)), vcpus, backend=SimulatedBackend(10**9)).save()


@pytest.mark.row("E13")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": "path"}, r"image is 'path', a str; it can be the bytes of a multiboot-1, PVH or Linux image"),
        ({"image": None}, r"image is None; it can be the bytes"),
        ({"vcpus": 1.5}, r"vcpus is 1\.5, a float; it can be a whole number"),
        ({"vcpus": True}, r"vcpus is True, a bool; it can be a whole number"),
        ({"vcpus": "2"}, r"vcpus is '2', a str; it can be a whole number"),
        ({"max_vcpus": "2"}, r"max_vcpus is '2', a str; it can be a whole number"),
        ({"vcpus": 3, "max_vcpus": 2}, r"max_vcpus is 2 of a machine with 3 vCPUs; give 3 or more, or None"),
        ({"vcpus_present": 1}, r"leave out: vcpus_present"),
        ({"max_vcpus": 3, "restore": a_state(2)}, r"the saved clock has 2 vCPUs and the machine 3; give max_vcpus=2"),
        ({"memory_bytes": "16M"}, r"memory_bytes is '16M', a str; it can be a whole number"),
        ({"memory_bytes": 16.0}, r"memory_bytes is 16\.0, a float; it can be"),
        ({"memory_bytes": 4097}, r"RAM of 4097 bytes; give a positive multiple of 4096, up to 3221225472"),
        ({"memory_bytes": 10**5000}, r"RAM of .* bytes; give"),
        ({"cmdline": b"cpus=2"}, r"cmdline is b'cpus=2', a bytes; it can be text"),
        ({"kvm": "/dev/kvm"}, r"kvm is '/dev/kvm', a str; it can be a Kvm, as open_kvm\(\) gives it"),
        ({"clock": "sundial"}, r"clock 'sundial'; choose \"engine\" or \"kernel\""),
        ({"clock": ["engine"]}, r"clock is a list; it can be text"),
        ({"vcpu_host": "emulator"}, r"a machine runs on /dev/kvm, in memory of its own; leave out: vcpu_host"),
        ({"memory": None}, r"leave out: memory"),
        ({"policy": "freeze"}, r"only a restored clock has options for its return; give restore, too: policy"),
        ({"clock": "kernel", "tsc_offset": 1}, r"takes no options but features: tsc_offset"),
        ({"clock": "kernel", "backend": ExecutionTimeBackend}, r"takes no options but features: backend"),
        ({"clock": "kernel", "restore": a_state(1), "features": 0}, r"takes no options but features: restore"),
        ({"tick_interval_s": "1"}, r"tick_interval_s is '1', a str; it can be a number"),
        ({"tick_interval_s": 2.5}, r"tick_interval_s is 2\.5; it can be 0\.001 to 2 seconds, or None"),
        ({"tick_interval_s": float("nan")}, r"tick_interval_s is nan; it can be"),
        ({"backend": SimulatedBackend(10**9)}, r"backend is a SimulatedBackend; it can be a function from"),
        (
            {"restore": "clock.json"},
            r"restore is 'clock\.json', a str; it can be a ClockState, as save\(\) or clock_state\.read",
        ),
        ({"restore": a_state(2)}, r"the saved clock has 2 vCPUs and the machine 1; give vcpus=2"),
        ({"restore": a_state(1), "provider": "KVM"}, r"takes none but policy, reference, any_tsc_hz, vmm: provider"),
    ],
    ids=lambda value: str(sorted(value))[:40] if isinstance(value, dict) else None,
)
def test_a_wrong_argument_is_named_with_what_is_wanted(
    arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a WrongType or a ConfigError, wherever this runs: not even /dev/kvm is opened."""
    monkeypatch.setattr("pvclock.machine.hardware.open_kvm", lambda: pytest.fail("something was made"))
    with pytest.raises((WrongType, ConfigError), match=said):
        Machine(**({"image": IMAGE} | arguments))


@pytest.mark.row("E13")
@pytest.mark.parametrize("profile", ["palacios", "sundial"])
def test_where_palacios_time_is(profile: str) -> None:
    """An unknown profile's error says which there are, and where Palacios' time is instead."""
    with pytest.raises(
        ConfigError,
        match=rf"profile '{profile}'; choose from 'linux', .* pvclock\.compat\.palacios .*ExecutionTimeBackend",
    ):
        GuestClock(GuestMemory(bytearray(1 << 14)), backend=SimulatedBackend(10**9), profile=profile)
