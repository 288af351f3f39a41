"""pvclock beside QEMU: uses pvclock's public names; pvclock does not depend on it."""

from qemu_glue.errors import NotKvm, QemuError, QemuExited, QemuMissing, QmpFailed, VirshFailed
from qemu_glue.peer.cpu_model import cpu_property

__all__ = ["NotKvm", "QemuError", "QemuExited", "QemuMissing", "QmpFailed", "VirshFailed", "cpu_property"]
