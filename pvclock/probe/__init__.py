"""The probe: a program in C that measures a guest's clocks from inside, for Linux and for no operating system.

docs/probe.md says what it measures and how to run it.  It is compiled when this package is built; judging what it
prints is pvclock.meter.inside's.
"""

from pvclock.probe._images import bootable_image, linux_executable

__all__ = ["bootable_image", "linux_executable"]
