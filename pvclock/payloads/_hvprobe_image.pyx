"""hvprobe, assembled into this module: one payload a module, for all have the labels of probe_boot.s."""

cdef extern from *:
    """
    __asm__(".pushsection .rodata\\n.include \\"hvprobe.s\\"\\n.popsection");
    #pragma GCC visibility push(hidden)
    extern const unsigned char hvprobe_image[], hvprobe_image_end[];
    #pragma GCC visibility pop
    """
    const unsigned char hvprobe_image[1]
    const unsigned char hvprobe_image_end[1]


def hvprobe() -> bytes:
    """The hvprobe guest: a multiboot-1 ELF32 file."""
    return hvprobe_image[:hvprobe_image_end - hvprobe_image]
