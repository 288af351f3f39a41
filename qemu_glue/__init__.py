"""pvclock beside QEMU: a view through pvclock's public names, never its base."""

from qemu_glue.errors import QemuError, QemuExited, QemuMissing, QmpFailed
from qemu_glue.peer.cpu_model import cpu_property

__all__ = ["QemuError", "QemuExited", "QemuMissing", "QmpFailed", "cpu_property"]
