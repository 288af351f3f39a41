"""Measures a guest's clock, whether the engine, the kernel, QEMU or this process serves it: all over one `Guest`."""
