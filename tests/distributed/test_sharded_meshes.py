"""Models that torch has sharded, over one and two dimensions: trained as by one process, or refused with the reason."""

import pytest
import torch
from torch import nn

import memopt
from tests.helpers.sharded_runs import of_meshes, session, train_blocks

#: What kernels round otherwise than torch, relative to the largest element.
RTOL = 1e-6


@pytest.mark.parametrize("spec", ["adamw-8bit/zero2", "adamw-8bit/zero3"])
def test_a_sharded_model_trains_as_one_process_does(spec):
    alone = train_blocks("adamw-8bit", 1)
    for rank in session(of_meshes):
        for a, b, c in zip(alone, rank["blocks"][spec], rank["two"]["hsdp"], strict=True):
            # The gradient is a mean over ranks: summed in another order, amplified by Adam where it is nearly zero.
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("rows", "adamw-8bit"),
        ("replicas", "adafactor"),
        ("columns", "adamw"),
        ("twice", "adafactor"),
        ("replicas", "muon"),
        ("rows", "muon-8bit"),
    ],
)
def test_meshes_of_two_dimensions(name, spec):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(255, 70))
    opt = memopt.create([("w", p)], spec)
    for step in range(3):
        p.grad = torch.randn(255, 70, generator=torch.Generator().manual_seed(step))
        opt.step()
    for rank in session(of_meshes):
        got, same_ledger = rank["two"][name, f"{spec}/zero3"]
        assert same_ledger
        assert (got - p).abs().max() <= RTOL * p.abs().max()


def test_columns_are_refused_where_rows_must_be_whole():
    """The override that is named keeps a rule of single elements; for one that needs rows it is of adamw."""
    for spec, kept in (
        ("adamw-8bit/zero3", "32bit"),
        ("adafactor/zero3", "adamw-32bit"),
        ("adafactor-32bit/zero3", "adamw-32bit"),
    ):
        assert f"overrides={{'w': '{kept}'}}" in session(of_meshes)[0]["two"][spec]


def test_a_parameter_that_is_not_as_the_spec_says_is_refused():
    for rank in session(of_meshes):
        found = rank["refusals"]
        assert "odd is whole on this rank" in found["whole"][0]
        assert "memopt.shard(model, spec)" in found["whole"][0]
        assert "write 'adamw-8bit/zero3'" in found["plain"][0]
        assert "write 'adamw-8bit/zero3'" in found["zero1"][0]
        assert all(states == 0 for _, states in found.values())


def test_a_spec_that_shards_nothing_is_refused_by_shard():
    with pytest.raises(memopt.SpecError, match="specs that do end in /zero2, /zero3"):
        memopt.shard(nn.Linear(2, 2), "adamw/zero1")
