"""A real QEMU beside pvclock: how it is launched, and controlled over QMP."""
