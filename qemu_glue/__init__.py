"""pvclock beside QEMU: uses pvclock's public names; pvclock does not depend on it."""

from qemu_glue.errors import QemuError, QemuExited, QemuMissing, QmpFailed
from qemu_glue.peer.cpu_model import cpu_property

__all__ = ["QemuError", "QemuExited", "QemuMissing", "QmpFailed", "cpu_property"]
