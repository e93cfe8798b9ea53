"""Stores of state by placement: allocate, fetch, write back."""
