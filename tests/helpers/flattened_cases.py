"""What the tests of DeepSpeed's flat vectors run on how many ranks."""

from __future__ import annotations

#: ranks, and what runs there: spec, stage, offload to the CPU, dtype of the weights, param groups.
CASES = {
    1: [("adafactor", 2, True, "float32", 1), ("came-8bit", 3, False, "bfloat16", 1)],
    2: [
        ("adafactor", 1, False, "float32", 2),
        ("came-8bit", 2, True, "float32", 1),
        ("lamb", 3, True, "float32", 2),
        ("stableadamw", 1, False, "bfloat16", 2),
        ("muon(adamw)", 2, True, "float32", 1),
    ],
    3: [
        ("adafactor", 3, False, "float32", 1),
        ("muon-8bit(adamw)", 1, False, "float32", 1),
        ("came-8bit", 3, False, "float32", 1),
        ("adamw-factored", 2, False, "float32", 2),
    ],
}
#: The same for tests that are marked slow.
MORE = {
    2: [("adammini-8bit", 2, False, "float32", 1)],
    3: [
        ("muon(adamw)", 3, False, "float32", 2),
        ("adafactor", 1, False, "bfloat16", 1),
        ("lamb-8bit", 2, False, "float32", 1),
    ],
}
