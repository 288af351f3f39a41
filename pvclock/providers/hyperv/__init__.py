"""Hyper-V's guest interface: the Hypervisor Top Level Functional Specification (TLFS), as far as time needs it."""

from pvclock.providers.hyperv.features import Feature, Hardware, Privilege, Recommendation
from pvclock.providers.hyperv.profiles import PROFILES
from pvclock.providers.hyperv.provider import HyperVProvider

__all__ = ["PROFILES", "Feature", "Hardware", "HyperVProvider", "Privilege", "Recommendation"]
