"""pvclock beside QEMU: a view through pvclock's public names, never its base."""

from qemu_glue.cpu_model import cpu_property
from qemu_glue.errors import QemuError, QemuExited, QemuMissing, QmpFailed

__all__ = ["QemuError", "QemuExited", "QemuMissing", "QmpFailed", "cpu_property"]
