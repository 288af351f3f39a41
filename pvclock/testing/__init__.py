"""For the tests of a VMM: budgets for a guest's clock, and pytest's fixtures."""
