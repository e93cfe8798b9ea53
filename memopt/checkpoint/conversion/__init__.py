"""State of one spec as state of another."""
