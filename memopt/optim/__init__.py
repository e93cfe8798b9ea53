"""What the optimizer is made of: layouts, state, step. Each is given what it needs and never the optimizer."""
