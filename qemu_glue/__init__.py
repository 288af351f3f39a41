"""pvclock beside QEMU: a view through pvclock's public names, never its base."""

from qemu_glue.cpu_model import cpu_property

__all__ = ["cpu_property"]
