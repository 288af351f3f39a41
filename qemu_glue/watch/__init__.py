"""`pvclock watch`: the clock of a running QEMU/KVM guest, from outside."""
