"""The clock in a QEMU migration stream: found, read, and replaced."""
