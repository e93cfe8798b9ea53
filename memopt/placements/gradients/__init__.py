"""Gradients on their way to the host: during backward, instead of ``p.grad``, and whether they are still the same."""
