"""How guests' clocks drift beside a clock of this host, and step."""
