"""`pvclock drift`: how far the clocks of the engine, of the kernel and of a running QEMU guest drift, and step."""
