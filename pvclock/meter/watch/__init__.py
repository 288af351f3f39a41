"""Watching the clock of a guest from outside, whatever VMM runs it: `pvclock watch`, docs/watch.md."""
