"""One VM's clock: parts that each own their state, behind the facade `GuestClock`."""
