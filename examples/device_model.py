"""A VMM with a device model of QEMU's kind, its guest's clock the pvclock device: `python examples/device_model.py`."""

import os

from pvclock import GuestMemory, HostBackend, KvmFeature
from pvclock.machine import RunState, RunStates
from qemu_glue.face.devices import DEVICE, Device, DeviceClass
from qemu_glue.face.objects import CONTAINER, Object, ObjectType
from qemu_glue.face.properties import UINT32, Property
from qemu_glue.face.pvclock_device import PVCLOCK, PVCLOCK_STATE, PvclockModel
from qemu_glue.face.resets import reset
from qemu_glue.face.vmstate import save_section
from qemu_glue.face.vmstate_load import load_section

SYSTEM_TIME_MSR, PAGE = 0x4B564D01, 0x2000

# A device of the VMM's own; its model is a dict.
PITCH = Property("pitch", UINT32, "In Hz.", lambda it: it.model["pitch"], lambda it, hz: it.model.update(pitch=hz))
BEEPER = DeviceClass(ObjectType("beeper", DEVICE, "It beeps.", (PITCH,)), reset_enter=lambda it: it.update(pitch=440))


def main() -> None:
    """Plug both in, let a guest read its clock, stop the VM, move the clock to another VM, and reset this one."""
    ram, run_states, root = bytearray(1 << 20), RunStates(), Object(CONTAINER)
    peripheral = root.add("machine", Object(CONTAINER)).add("peripheral", Object(CONTAINER))
    model = PvclockModel.of_clock(GuestMemory(ram), backend=HostBackend())
    clock, beeper = Device(PVCLOCK, model), Device(BEEPER, {"pitch": 880})
    peripheral.add("pvclock", clock.object).set("features", int(KvmFeature.CLOCKSOURCE2))
    peripheral.add("beeper", beeper.object)
    clock.realize()
    beeper.realize()
    run_states.add_handler(model.change_run_state)
    run_states.update(lambda: RunState.RUNNING)

    model.clock.write_msr(0, SYSTEM_TIME_MSR, PAGE | 1)  # the guest's WRMSR
    root.find("/machine/peripheral/pvclock").set("rate", "1/2")  # a client's qom-set
    print("the guest reads", model.clock.read(0), "ns at rate", clock.object.get("rate"))
    run_states.update(lambda: RunState.PAUSED)

    section = save_section(PVCLOCK_STATE, model, section_id=7)
    loaded = PvclockModel.of_clock(GuestMemory(bytearray(ram)), backend=HostBackend())
    load_section(PVCLOCK_STATE, loaded, section)
    print(f"{len(section)} bytes; it goes on at {loaded.clock.now()} ns, here it is {model.clock.now()} ns")

    reset(root)
    print("after the reset:", model.clock.page(0), "and", root.find("beeper").get("pitch"), "Hz")


if __name__ == "__main__":
    try:
        main()
    except OSError:  # nobody reads on, or the disk is full
        os._exit(2)  # sys.exit() would write what is left, and fail again
