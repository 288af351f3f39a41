"""`pvclock ctl`: a command to the QMP socket of a QEMU, or of a machine of ours."""
