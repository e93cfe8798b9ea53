"""A format for each kind of moment, in every place and cut in every way: the whole table, which takes minutes."""

from itertools import product

import pytest
import torch
from torch import nn

import memopt
from memopt.placements import PLACEMENTS
from memopt.rules import RULES
from tests.helpers.cases import HYPER, assert_same_bits, live_nbytes
from tests.placements.test_placements import SMALL, drive

PARTITIONS = ("none", "zero1", "zero3")
#: Without these a rule has moments of one kind.
KINDS: dict[str, dict[str, float]] = {**HYPER, "rmsprop": {"momentum": 0.9}, "adafactor": {"beta1": 0.9}}
#: rule -> every pair that it takes.
PAIRS: dict[str, list[str]] = {}
for one in memopt.specs(pairs=True):
    if "." in one.format and (one.placement, one.partition, one.master) == ("device", "none", "none"):
        PAIRS.setdefault(one.rule, []).append(one.format)
#: Of adamw every pair in every place; of the others each pair in one of them, in turn.
WHERE = list(product(PLACEMENTS, PARTITIONS))


class Odd(nn.Module):
    """Rows of no whole block, rows of which several share one, a stack, a vector, a small matrix."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"odd": (66, 131), "narrow": (515, 9), "stack": (3, 23, 65), "long": (4352,), "small": (5, 3)}
        g = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=g)))


def run(spec: memopt.OptimSpec, overrides: dict[str, str]) -> tuple[nn.Module, memopt.Optimizer]:
    model = Odd()
    keywords = {"overrides": overrides, **KINDS.get(spec.rule, {}), **SMALL.get(spec.placement, {})}
    opt = memopt.create(model, spec, **keywords)
    drive(model, opt, 0, 3)
    predicted = memopt.price(model, spec, **keywords)
    assert opt.ledger() == predicted, str(spec)
    assert live_nbytes(opt) == predicted.nbytes, str(spec)
    return model, opt


def check(rule: str, fmt: str, places: list[tuple[str, str]]) -> None:
    plain = memopt.parse(f"{rule}-{fmt}")
    # Sums over a tensor that ranks may share are taken in another order.
    sums = not RULES[rule].element_wise or "factored" in fmt
    for partition in PARTITIONS:
        chosen = [placement for placement, cut in places if cut == partition]
        # What FSDP cuts within a block is in 32 bits there.
        overrides = {"long": "32bit", "narrow": "32bit"} if partition == "zero3" else {}
        if chosen:
            model, opt = run(plain.replace(partition="zero1" if sums and partition != "none" else "none"), overrides)
        for placement in chosen:
            there, other = run(plain.replace(placement=placement, partition=partition), {})
            for (name, p), (_, q) in zip(model.named_parameters(), there.named_parameters(), strict=True):
                what = f"{other.spec} {name}"
                assert_same_bits(p, q, what)
                assert opt.state[p].keys() == other.state[q].keys(), what
                for key, value in opt.state[p].items():
                    assert_same_bits(value, other.state[q][key], f"{what} {key}")


def test_a_sample():
    check("adamw", "8bit.factored", [("host", "zero1"), ("disk", "zero3")])


@pytest.mark.slow
@pytest.mark.parametrize("fmt", PAIRS["adamw"])
def test_every_pair_in_every_place(fmt):
    check("adamw", fmt, WHERE)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in PAIRS if rule != "adamw"])
def test_every_rule_with_every_pair(rule):
    for i, fmt in enumerate(PAIRS[rule]):
        check(rule, fmt, [WHERE[i % len(WHERE)]])
