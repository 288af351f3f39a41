"""Guests of our own, in assembly, that look at their clock and write down what they see."""

from pvclock.payloads._hvprobe_image import hvprobe
from pvclock.payloads._images import clockprobe

__all__ = ["clockprobe", "hvprobe"]
