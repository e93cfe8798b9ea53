"""A memopt optimizer and its twin of torch.optim through the same random sequence of operations.

A sequence is text: a case's seed, then operations, each with a seed of its own (``7: step/3 grow/9 save/1``). So it can
be replayed, cut down and kept as a test; an operation that is added changes no other one.

``cases`` draws what the optimizer is, ``machine`` is the pair and what is compared, ``sequences`` draws, replays and
shortens; the other files are operations, by what they do it to.
"""
