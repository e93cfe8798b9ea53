"""What owners do to a running optimizer: groups and state changed by hand, rows of state selected and appended."""
