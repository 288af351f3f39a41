"""A guest's second life, in a process of its own: `python -m tests.kvm.restored_guest GUEST STATE RAM POLICY`.

The clock goes on from the file STATE, the guest's memory from the file RAM, and its vCPUs begin at the image's entry,
with image and variables anew, as any boot does; but the newest time that a vCPU of the first life has seen stays, and
no vCPU may read less.  Prints what was found as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from pvclock import Machine
from pvclock.payloads import clockprobe, hvprobe, hyperv_probe, probe
from pvclock.state import clock_state
from tests.waiting import HANG_S

VCPUS: Final = 2
IMAGES: Final = {"hvprobe": hvprobe, "clockprobe": clockprobe}
COMMANDS: Final = {"hvprobe": "cpus=2 rounds=20", "clockprobe": "cpus=2 reads=5000"}
VARIABLES: Final = range(0x206000)
"""Boot information, image, variables, block and records of both probes; their clocks' pages lie elsewhere."""
NEWEST: Final = slice(0x200040, 0x200048)


def second_life(guest: str, state: Path, ram: Path, policy: str) -> dict[str, object]:
    """Let it run; what its vCPUs have read, and how their clock went on."""
    saved = clock_state.read(state)
    with Machine(
        IMAGES[guest](), vcpus=VCPUS, cmdline=COMMANDS[guest], restore=saved, policy=policy, tick_interval_s=None
    ) as machine:
        booted = machine.memory.read(VARIABLES.start, len(VARIABLES))
        content = ram.read_bytes()
        machine.memory.write(0, content)
        machine.memory.write(VARIABLES.start, booted)
        machine.memory.write(NEWEST.start, content[NEWEST])
        machine.start()
        code = machine.wait(HANG_S)
        assert machine.clock is not None
        events = machine.clock.events.read().events
        resumed = next(event for event in events if event.kind == "resume")
        return {
            "exit": code,
            "jump_ns": int(resumed.jump_ns),
            "slews": any(event.kind == "slew" for event in events),
        } | ({"records": [findings(machine, guest, vcpu) for vcpu in range(VCPUS)]})


def findings(machine: Machine, guest: str, vcpu: int) -> dict[str, int]:
    """One vCPU's record, by name."""
    module = hyperv_probe if guest == "hvprobe" else probe
    record: probe.ProbeRecord | hyperv_probe.HvRecord = module.read_record(machine.memory, vcpu)
    return record._asdict()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(second_life(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
