"""A rule over ranks, for tests that hold it against one process: some steps, its own state loaded, and some more."""

from __future__ import annotations

from typing import Any

import torch

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits
from tests.helpers.sharded import drive, uneven_model

Runs = list[tuple[str, dict[str, Any]]]


def run(runs: Runs) -> list[dict[str, Any]]:
    """For each ``(spec, hyperparameters)``: parameters, rates with what prodigy multiplies them by, and whether the
    state took what it was said to take."""
    found = []
    for spec, hyper in runs:
        model = uneven_model(torch.float32)
        opt = memopt.create(model, spec, **hyper)
        drive(model, opt, 0, 2)
        saved = opt.state_dict()
        opt = memopt.create(model, spec, **hyper)
        opt.load_state_dict(saved)
        drive(model, opt, 2, 2)
        rank, world = opt.partition.rank, opt.partition.world_size
        found.append(
            {
                "model": model.state_dict(),
                "rates": [(group["lr"], group.get("d")) for group in opt.param_groups],
                "same_price": opt.ledger() == memopt.price(model, spec, rank=rank, world_size=world, **hyper),
            }
        )
    return found


def check_ranks(world: int, runs: Runs) -> None:
    """Every rank of ``world`` ends with one process's bits."""
    alone = run(runs)
    for rank in ranks.run(run, world, runs):
        for (spec, _), found, expected in zip(runs, rank, alone, strict=True):
            assert found["same_price"], spec
            assert found["rates"] == expected["rates"], spec
            for name, p in expected["model"].items():
                assert_same_bits(found["model"][name], p, f"{spec} {name}")
