"""Hyper-V's guest interface: the Hypervisor Top Level Functional Specification (TLFS), as far as time needs it."""
