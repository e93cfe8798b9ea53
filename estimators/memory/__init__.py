"""Bytes of one rank: weights, gradients, state, activations and the runtime, as rows."""
