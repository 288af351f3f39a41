"""The probe's two forms as they were linked, taken into this module."""

cdef extern from *:
    """
    __asm__(".pushsection .rodata\\n"
            "probe_linux: .incbin \\"linux\\"\\nprobe_linux_end:\\n"
            "probe_bare: .incbin \\"bare\\"\\nprobe_bare_end:\\n"
            ".popsection");
    #pragma GCC visibility push(hidden)
    extern const unsigned char probe_linux[], probe_linux_end[], probe_bare[], probe_bare_end[];
    #pragma GCC visibility pop
    """
    const unsigned char probe_linux[1]
    const unsigned char probe_linux_end[1]
    const unsigned char probe_bare[1]
    const unsigned char probe_bare_end[1]


def linux_executable() -> bytes:
    """A static program for x86-64 Linux, which needs neither a library nor a privilege; `--help` says its options."""
    return probe_linux[:probe_linux_end - probe_linux]


def bootable_image() -> bytes:
    """An ELF64 file that a VMM boots as a guest: by multiboot 1, by PVH, or at its entry with Linux's boot_params."""
    return probe_bare[:probe_bare_end - probe_bare]
