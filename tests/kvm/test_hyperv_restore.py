"""A save on the host, and a restore in another process, of guests that use Hyper-V's clock, KVM's, or both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from pvclock import Machine
from pvclock.payloads import hyperv_probe, probe
from pvclock.providers.hyperv.features import Privilege
from pvclock.state import clock_state
from tests.kvm.hyperv_guest import clock_of
from tests.kvm.restored_guest import IMAGES, NEWEST, VCPUS
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E1", "E4", "H-36", "H-54", "P-25")]

ROOT: Final = Path(__file__).parents[2]
READINGS: Final = 500
RAM_BYTES: Final = 16 << 20
"""A machine's, if nothing else is said."""


class User(NamedTuple):
    """A guest and the interfaces that it has."""

    guest: str
    provider: str
    privileges: Privilege = Privilege(0)
    """Those that it does without."""

    @property
    def ns_per_reading(self) -> int:
        """Of a unit of its times."""
        return 100 if self.guest == "hvprobe" else 1


USERS: Final = {
    "page": User("hvprobe", "HyperV"),
    "counter": User("hvprobe", "HyperV", Privilege.REFERENCE_TSC),
    "page beside pvclock": User("hvprobe", "HyperV+KVM"),
    "pvclock beside Hyper-V": User("clockprobe", "HyperV+KVM"),
}


LIFE_NS: Final = 10**11
"""A first life is longer than any boot takes, so that a clock that goes back to its middle is one that shows it."""


class FirstLife(NamedTuple):
    """Files of clock and RAM; the newest reading of any vCPU, and the page's last sequence."""

    state: Path
    ram: Path
    newest: int
    sequence: int


def first_life(user: User, folder: Path) -> FirstLife:
    """Let the guest read on two vCPUs, pause it, and save."""
    options: dict[str, Any] = {"provider": user.provider}
    if user.privileges:
        with Machine(IMAGES[user.guest](), vcpus=VCPUS, **options) as offering:
            offered = clock_of(offering).interface.config["privileges"]
        options["privileges"] = int(offered) & ~int(user.privileges)
    with Machine(
        IMAGES[user.guest](), vcpus=VCPUS, cmdline=f"cpus={VCPUS}", tick_interval_s=None, **options
    ) as machine:
        machine.start()
        wait_for_readings(machine, user)
        clock_of(machine).dilate(5, 4)
        clock_of(machine).skip(LIFE_NS)
        wait_for_readings(machine, user)
        machine.pause()
        life = FirstLife(folder / "clock.json", folder / "ram", newest(machine), sequence_of(machine, user))
        clock_state.write(life.state, machine.save())
        life.ram.write_bytes(machine.memory.read(0, RAM_BYTES))
    return life


def wait_for_readings(machine: Machine, user: User) -> None:
    """Return once each vCPU has read its clock some thousand times more."""
    goals = [reads(machine, user, vcpu) + READINGS for vcpu in range(VCPUS)]
    end_s = time.monotonic() + HANG_S
    while any(reads(machine, user, vcpu) < goal for vcpu, goal in enumerate(goals)):
        assert time.monotonic() < end_s
        assert not machine.runner.join(0.001)


def reads(machine: Machine, user: User, vcpu: int) -> int:
    """How often vCPU has read its clock so far."""
    module = hyperv_probe if user.guest == "hvprobe" else probe
    return int(module.read_record(machine.memory, vcpu).reads)


def newest(machine: Machine) -> int:
    """The newest time that any vCPU has seen."""
    return int.from_bytes(machine.memory.read(NEWEST.start, 8), "little")


def sequence_of(machine: Machine, user: User) -> int:
    """The reference TSC page's; 0 where the guest reads none."""
    if user.guest != "hvprobe" or user.privileges:
        return 0
    return int.from_bytes(machine.memory.read(hyperv_probe.REFERENCE_PAGE, 4), "little")


def second_life(user: User, life: FirstLife, policy: str) -> dict[str, Any]:
    """In another process; see tests/kvm/restored_guest.py."""
    command = [sys.executable, "-m", "tests.kvm.restored_guest", user.guest, str(life.state), str(life.ram), policy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


POLICIES: Final = {
    "page": "advance",
    "counter": "freeze",
    "page beside pvclock": "slew",
    "pvclock beside Hyper-V": "slew",
}
"""Those of the quick run."""
CASES: Final = tuple(
    pytest.param(use, policy, marks=() if POLICIES[use] == policy else pytest.mark.long)
    for use, policy in product(USERS, ("freeze", "advance", "slew"))
)


@pytest.mark.parametrize(("use", "policy"), CASES)
def test_a_guest_reads_on_in_another_process(use: str, policy: str, tmp_path: Path) -> None:
    """No vCPU of it reads less than any has read in the first process; a page's sequence is one never seen."""
    user = USERS[use]
    life = first_life(user, tmp_path)
    found = second_life(user, life, policy)
    assert found["exit"] == probe.EXIT_FINE
    first = "first_units" if user.guest == "hvprobe" else "first_ns"
    for record in found["records"]:
        assert record["backward_own"] == record["backward_cross"] == 0, record
        assert record[first] * user.ns_per_reading >= life.newest * user.ns_per_reading + found["jump_ns"] - 1000
        assert record[first] >= life.newest
        if life.sequence:
            assert record["first_sequence"] > life.sequence
            assert record["sequence_back"] == record["torn"] == 0
    assert (found["jump_ns"] > 0) is (policy == "advance")
    assert found["slews"] is (policy == "slew")


def test_a_clock_that_goes_back_is_found(tmp_path: Path) -> None:
    """With half of the saved time and no reference time, every vCPU reads less than was read in the first process."""
    user = USERS["page"]
    life = first_life(user, tmp_path)
    state = clock_state.read(life.state)
    provider = state.provider._replace(msrs={**state.provider.msrs, "reference_units": 0})
    timeline = state.timeline._replace(guest_ns=state.timeline.guest_ns / 2)
    clock_state.write(life.state, state._replace(provider=provider, timeline=timeline))
    found = second_life(user, life, "freeze")
    assert all(record["backward_cross"] > 0 for record in found["records"])
