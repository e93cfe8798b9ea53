"""What people do to state by hand, and surgery, where parameters and state are shared out over two ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memopt
from tests.helpers import ranks, sharded
from tests.helpers.cases import assert_same_bits

SPECS = ["adamw-8bit/zero3", "adamw/zero2", "adamw-4bit/zero1", "adamw-8bit@host/zero3"]

#: What is put into the state of ``odd``, a matrix [255, 67]: of the whole shape, or as the parameter is cut.
BY_HAND: dict[str, Callable[[Any], Any]] = {
    "like the parameter": lambda p: torch.full_like(p.detach(), 0.25),
    "whole": lambda p: torch.arange(255.0).view(255, 1).expand(255, 67).contiguous(),
    "whole, 16 bits": lambda p: torch.full((255, 67), 0.5, dtype=torch.bfloat16),
}


class Larger(sharded.Uneven):
    """Ten rows more of ``odd``."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(265, 67))


def by_hand(spec: str, what: str, build: Callable[[str], Any]) -> list[Tensor]:
    """The weights after two steps, moments put there by hand, and two steps more."""
    model, opt = build(spec)
    sharded.drive(model, opt, 0, 2)
    opt.state[model.odd] = {
        "step": opt.state[model.odd]["step"],
        "exp_avg": BY_HAND[what](model.odd),
        "exp_avg_sq": BY_HAND[what](model.odd),
    }
    sharded.drive(model, opt, 2, 2)
    return [sharded.whole(p) for p in model.parameters()]


def surgery(spec: str, build: Callable[[str, nn.Module], Any]) -> list[Tensor]:
    """A vocabulary extended into a new weight, rows pruned into another, two steps more."""
    model, opt = build(spec, sharded.uneven_model())
    sharded.drive(model, opt, 0, 2)
    larger = Larger()
    if dist.is_initialized() and spec.endswith(("2", "3")):
        memopt.shard(larger, spec)
    for name, p in model.named_parameters():
        q = getattr(larger, name)
        if name == "odd":
            opt.append_rows(p, into=q)
        else:
            opt.select_rows(p, torch.arange(len(p)).roll(1), into=q)
    sharded.drive(larger, opt, 2, 2)
    return [sharded.whole(p) for p in larger.parameters()]


def own(spec: str) -> tuple[Any, ...]:
    """Keys of the user's own through a step, a checkpoint and a state_dict; what is refused."""
    model, opt = sharded.build(spec)
    sharded.drive(model, opt, 0, 1)
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders, 0)
    opt.state[model.odd]["note"], opt.state[model.odd]["mine"] = 7, torch.arange(3.0)
    sharded.drive(model, opt, 1, 1)
    memopt.save(folders[0], model=model, optimizer=opt)
    other, again = sharded.build(spec)
    memopt.load(folders[0], model=other, optimizer=again)
    found = again.state[other.odd]["note"], again.state[other.odd]["mine"]
    said = []
    opt.state[model.odd]["exp_avg"] = torch.zeros(3, 3)
    try:
        sharded.drive(model, opt, 2, 1)
    except RuntimeError as error:
        said.append(str(error))
    if dist.get_rank() == 1:
        again.state[other.odd]["step"] += 1
    try:
        memopt.save(folders[0], model=other, optimizer=again)
    except RuntimeError as error:
        said.append(str(error))
    return (*found, said)


def on_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in SPECS:
        found[spec] = {what: by_hand(spec, what, sharded.build) for what in BY_HAND}
        found[spec]["own"] = own(spec)
    for spec in (*SPECS, "lookahead(adamw)-8bit/zero3"):
        found.setdefault(spec, {})["surgery"] = surgery(spec, sharded.build)
    return found


@ranks.once
def session() -> list[dict[str, Any]]:
    return ranks.run(on_two_ranks, 2)


def alone(spec: str, model: nn.Module | None = None) -> Any:
    whole = memopt.parse(spec).replace(partition="none")
    cuts = spec.endswith(("2", "3")) and whole.format != "32bit"
    return sharded.build(str(whole), model, overrides=sharded.CUT_WITHIN if cuts else {})


@pytest.mark.parametrize("what", BY_HAND)
@pytest.mark.parametrize("spec", SPECS)
def test_moments_put_there_by_hand_are_taken_over(spec, what):
    expected = by_hand(spec, what, alone)
    for rank in session():
        for a, b in zip(rank[spec][what], expected, strict=True):
            assert_same_bits(a, b, what)


@pytest.mark.parametrize("spec", [*SPECS, "lookahead(adamw)-8bit/zero3"])
def test_rows_go_into_a_weight_that_is_sharded_anew(spec):
    expected = surgery(spec, alone)
    for rank in session():
        for a, b in zip(rank[spec]["surgery"], expected, strict=True):
            assert_same_bits(a, b, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_the_users_own_stays_and_what_cannot_be_is_refused(spec):
    for rank in session():
        note, mine, said = rank[spec]["own"]
        assert note == 7
        assert torch.equal(mine, torch.arange(3.0))
        assert "odd" in said[0]
        assert "nothing was saved: the state on rank 1 is not of the same step as on rank 0 (odd has stepped" in said[1]
