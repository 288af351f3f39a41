"""How guest time passes, as pure policy: no I/O, no thread, no clock."""
