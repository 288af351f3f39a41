"""Where host time comes from: backends, and a watch over the host."""
