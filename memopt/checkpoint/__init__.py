"""Optimizer state that travels: between formats, tools, world sizes and processes."""
