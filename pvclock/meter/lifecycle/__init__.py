"""What becomes of a guest's clock when its VMM stops, continues, resets, saves and loads it: docs/commands.md."""
