"""Our machine as QEMU's own tools see one."""
