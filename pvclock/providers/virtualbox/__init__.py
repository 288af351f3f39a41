"""VirtualBox's guest interface manager beside its providers, for VMMs that emulate CPUs: saved unit, debug channel."""
