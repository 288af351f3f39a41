"""Clocks of other VMMs, as models to compare with."""
