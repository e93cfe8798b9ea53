"""A small language model trained on real text, once for each spec: the whole promise run end to end.

Each run has processes of its own, so that its peak memory is its own, and its state is priced before they exist.
"""
