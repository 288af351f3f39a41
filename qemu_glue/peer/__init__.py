"""A real QEMU beside us: launched, and talked to over QMP."""
