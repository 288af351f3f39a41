"""One VM's clock, put together from parts that each own their state; `GuestClock` is their face."""
