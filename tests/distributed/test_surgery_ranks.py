"""Rows of state on several ranks: selected, appended, reset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import ranks, sharded
from tests.helpers.cases import assert_same_bits
from tests.helpers.surgery import made, step


def on_ranks(spec: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Weights and this rank's state after surgery in mid-training."""
    params, opt = made(spec)
    for p in params:
        opt.select_rows(p, torch.arange(len(p)).roll(2)[: len(p) - 1])
        opt.append_rows(p, torch.ones(4, *p.shape[1:]))
        opt.reset_state(p, rows=[0, 2])
    step(params, opt, 2, first=7)
    return [(p.detach(), dict(opt.state[p])) for p in params]


RANKED = ["adamw-8bit", "adafactor", "lookahead(adamw)-4bit", "adamw-8bit+split", "came-8bit"]


@ranks.once
def session() -> list[dict[str, Any]]:
    return ranks.run(on_two_ranks, 2)


def on_two_ranks() -> dict[str, Any]:
    return {**{spec: on_ranks(f"{spec}/zero1") for spec in RANKED}, "reset": sharded_reset("adamw-8bit/zero3")}


@pytest.mark.parametrize("spec", RANKED)
def test_ranks_share_the_rows_anew(spec):
    """Two processes of /zero1 have what one has, bit for bit, each its rows."""
    alone = on_ranks(f"{spec}/zero1")
    both = [rank[spec] for rank in session()]
    for i, (p, state) in enumerate(alone):
        for rank in both:
            assert_same_bits(rank[i][0], p, f"{spec} {tuple(p.shape)}")
        for key, x in state.items():
            parts = [rank[i][1][key] for rank in both]
            whole = parts[0] if parts[0].shape == x.shape else _joined(parts)
            assert_same_bits(whole, x, f"{spec} {tuple(p.shape)} {key}")


def _joined(parts: list[Tensor]) -> Tensor:
    bits = [x.view(torch.uint8) if x.itemsize == 1 else x for x in parts]
    return torch.cat(bits).view(parts[0].dtype)


def sharded_reset(spec: str) -> list[Tensor]:
    """What :func:`sharded.drive` gives with a reset between, of parameters that torch has sharded or of whole ones."""
    model, opt = sharded.build(spec) if "zero" in spec else sharded.reference(f"{spec}/zero3")
    sharded.drive(model, opt, 0, 3)
    for name, p in model.named_parameters():
        opt.reset_state(p, "exp_avg", rows=[0, 1] if name != "odd" else range(100, 200))
        if "zero" in spec:
            with pytest.raises(RuntimeError, match="strict=False"):
                opt.append_rows(p, torch.zeros(1))
    sharded.drive(model, opt, 3, 2)
    return [sharded.whole(p) for p in model.parameters()]


def test_rows_of_sharded_parameters_are_reset_and_stay_where_they_are():
    for rank in session():
        for a, b in zip(rank["reset"], sharded_reset("adamw-8bit"), strict=True):
            assert_same_bits(a, b)
