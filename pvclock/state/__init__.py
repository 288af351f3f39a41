"""Saved clocks: their schema, and files that are replaced as a whole."""
