"""The table of cases: every spec, what it needs to be built, and the model on which contracts are checked.

A new rule, format or placement appears here by itself, through ``memopt.specs()``; one that needs a hyperparameter to
keep any state gets a row in ``HYPER``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.masters import MASTERS

#: Hyperparameters without which a rule keeps no state, or goes nowhere in a few steps.
#: A rank under that of their matrices, so that something is projected.
HYPER: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "prodigy": {"d0": 1.0}, "apollo": {"projection_rank": 64}}

#: Every spec without a master (MASTERED has those with one, each axis varied on its own), but of the partitions that
#: shard parameters only ``/zero3`` in two places: the optimizer of ``/zero2`` is the same.
SPECS = [
    str(spec)
    for spec in memopt.specs()
    if spec.master == "none"
    and (
        spec.partition not in ("zero2", "zero3") or (spec.partition == "zero3" and spec.placement in ("device", "disk"))
    )
]
#: One spec for each rule × format, where the state is and who owns it being the plain default.
PLAIN_SPECS = [s for s in SPECS if "@" not in s and "/" not in s]

#: Every master with rules of one pass and of several, a low-bit format, another place, and cut over ranks.
MASTERED = [
    str(spec)
    for spec in memopt.specs()
    if spec.master != "none"
    and f"{spec.rule}-{spec.format}@{spec.placement}/{spec.partition}"
    in (
        "adamw-32bit@device/none",
        "adamw-8bit@device/none",
        "adamw-8bit@paged/zero1",
        "adafactor-factored@device/none",
        "lion-8bit@device/none",
        "sgd-32bit@device/none",
    )
]

#: Hyperparameter variants that keep other moments than the default.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"amsgrad": True}),
    ("adamw-8bit", {"amsgrad": True}),
    ("adam-4bit@paged", {"amsgrad": True}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("rmsprop", {"centered": True, "momentum": 0.9}),
    ("rmsprop-8bit", {"momentum": 0.9}),
    ("rmsprop-factored", {"momentum": 0.9}),
    ("adafactor", {"beta1": 0.9}),
    ("adafactor", {"convention": "transformers"}),
    ("adafactor-8bit", {"beta1": 0.9}),
    ("ademamix-8bit", {"t_alpha": 9, "t_beta3": 9}),
    ("lookahead(adamw)", {"lookahead_steps": 3}),
    ("lookahead(adamw)-8bit@paged", {"lookahead_steps": 3}),
    ("lookahead(sgd)/zero1", {}),
    ("lookahead(adamw)-8bit@disk", {"lookahead_steps": 3}),
    ("radam-bf16", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("prodigy-8bit/zero1", {"sliced": True, "d0": 1.0}),
]


#: A format for each kind of moment: every placement, every format on either side, rules of one pass and of several.
PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("adamw-8bit.factored", {}),
    ("adamw-4bit.factored@paged/zero1", {}),
    ("adamw-8bit.factored@host", {}),
    ("adamw-8bit.factored@disk/zero3", {}),
    ("adam-bf16.8bit@cpu", {}),
    ("adamw-4bit.8bit/zero3", {}),
    ("ademamix-4bit.8bit/zero1", {}),
    ("ademamix-8bit.factored", {}),
    ("came-8bit.factored", {}),
    ("lamb-8bit.4bit", {}),
    ("stableadamw-fp8.factored/zero3", {}),
    ("radam-32bit.fp8@disk", {}),
    ("adabound-bf16.factored+split/zero1", {}),
    ("rmsprop-4bit.factored", {"momentum": 0.9}),
    ("adafactor-8bit.factored", {"beta1": 0.9}),
    ("lookahead(adamw)-8bit.factored", {"lookahead_steps": 3}),
    ("prodigy-8bit.factored", {"d0": 1.0}),
]


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test of which one in so many runs always, and the others only among the slow tests."""
    every_value = [c if type(c) is tuple else (c,) for c in cases]
    return [pytest.param(*c, marks=[pytest.mark.slow] if i % every else []) for i, c in enumerate(every_value)]


def sampled(every: int) -> list[str]:
    """Every rule × format where it is plain, and of its placements and partitions one in so many, in turn. They do not
    know the rule; each rule and each format meets each of them."""
    turn = {s: PLAIN_SPECS.index(_stem(s)) + ENDINGS.index(_ending(s)) for s in SPECS}
    return [s for s in SPECS if s in PLAIN_SPECS or turn[s] % every == 0]


def _stem(spec: str) -> str:
    return str(memopt.parse(spec).replace(placement="device", partition="none"))


def _ending(spec: str) -> tuple[str, str]:
    parsed = memopt.parse(spec)
    return parsed.placement, parsed.partition


ENDINGS = list(dict.fromkeys(_ending(s) for s in SPECS))

#: (spec, hyperparameters) for a sample of the specs, and every variant.
CASES = [(s, HYPER.get(memopt.parse(s).rule, {})) for s in sampled(4)] + VARIANTS + PAIRS
CASE_IDS = [s + "".join(f" {k}={v}" for k, v in h.items()) for s, h in CASES]


class Odd(nn.Module):
    """A model with every awkward shape: a tied embedding, a convolution, biases, a norm, a 5 × 3 matrix, a vector of
    4097 elements, an empty tensor and a scalar; rows that are no multiple of any block, and stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 67)
        self.conv = nn.Conv1d(67, 70, 3)
        self.norm = nn.LayerNorm(70)
        self.small = nn.Linear(3, 5)
        self.vector = nn.Parameter(torch.randn(4097))
        self.empty = nn.Parameter(torch.empty(0, 7))
        self.nothing = nn.Parameter(torch.empty(0))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.experts = nn.Parameter(torch.randn(3, 129, 65) / 8)
        self.wide = nn.Linear(700, 67, bias=False)
        self.head = nn.Linear(67, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, seed: int) -> Tensor:
        """A loss that touches every parameter; inputs are a function of ``seed``."""
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 300, (4, 20), generator=g)
        x = self.embedding(tokens)
        y = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        z = self.wide(torch.randn(4, 700, generator=g).to(x.dtype))
        logits = self.head(x.mean(1) + z)
        w = torch.randn(4097, generator=g).to(x.dtype)
        e = torch.einsum("eij,j->ei", self.experts, torch.randn(65, generator=g).to(x.dtype))
        return (
            nn.functional.cross_entropy(logits, tokens[:, 0])
            + y.square().mean()
            + self.small(torch.randn(2, 3, generator=g).to(x.dtype)).square().mean()
            + (self.vector * w).mean() * self.scalar
            + self.vector.square().mean()
            + e.square().mean()
            + self.empty.sum()
            + self.nothing.sum()
        )


def odd_model(dtype: torch.dtype = torch.float32) -> Odd:
    torch.manual_seed(0)
    return Odd().to(dtype)


def train(model: Odd, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    """Steps ``first`` up to ``first + steps``, each on its own data."""
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        model(seed).backward()
        optimizer.step()


def live_nbytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in ``optimizer.state`` and of the buffers that it streams through, counted without the
    ledger."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    tensors += [t for placement_store in getattr(optimizer, "placement_stores", ()) for t in placement_store.tensors()]
    return sum(t.numel() * t.element_size() for t in tensors)


#: State keys of what masters keep beside the weights.
MASTER_KEYS = {m.key for m in MASTERS.values() if m.key}


def assert_same_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    assert a.dtype == b.dtype, what
    assert a.shape == b.shape, what
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.detach().contiguous().view(view), b.detach().contiguous().view(view)), what
