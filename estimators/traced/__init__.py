"""Models without a formula: any module's parameters, and its activations from one step on fake tensors.

A step is run as it would be, by autograd, on tensors that have a shape and no elements; what is allocated and freed, in
order, is the tape from which the figures follow and which the allocator's model replays. Needs torch; a configuration
needs transformers too.
"""
