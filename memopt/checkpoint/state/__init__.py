"""Optimizer state in one form, wherever it is: in files, in memory, in another tool's dictionary."""
