"""The guest payloads, assembled into this module."""

cdef extern from *:
    """
    __asm__(".pushsection .rodata\\n.include \\"clockprobe.s\\"\\n.popsection");
    #pragma GCC visibility push(hidden)
    extern const unsigned char clockprobe_image[], clockprobe_image_end[];
    #pragma GCC visibility pop
    """
    const unsigned char clockprobe_image[1]
    const unsigned char clockprobe_image_end[1]


def clockprobe() -> bytes:
    """The clockprobe guest: a multiboot-1 ELF32 file."""
    return clockprobe_image[:clockprobe_image_end - clockprobe_image]
