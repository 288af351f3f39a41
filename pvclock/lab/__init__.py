"""A full upstream Linux KVM on any x86-64 Linux: QEMU's TCG emulates AMD SVM, virtme-ng boots a Debian kernel in it.

    outcome = run_in_lab(["python", "-m", "pytest"], LabConfig(cpus=2))

The command sees this root file system, working directory and virtual environment, and a /dev/kvm.
"""

from pvclock.lab.machine import LabConfig
from pvclock.lab.session import Outcome, run_in_lab

__all__ = ["LabConfig", "Outcome", "run_in_lab"]
