"""Watching the clock of a guest from outside, whoever runs it: `pvclock watch`, docs/watch.md."""
