"""Measures a guest clock, ours or another one."""
