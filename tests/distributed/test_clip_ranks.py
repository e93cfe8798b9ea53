"""Clipping inside the step over several ranks: the norm is that of all gradients."""

import math

import pytest
import torch
import torch.distributed as dist

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits
from tests.helpers.clipped import BOUND, give


def sharded(spec):
    from torch.distributed.tensor import distribute_tensor

    shapes = [(17, 300), (66, 30), (33,)]
    found = {}
    for name, bound in (("inside", BOUND), ("outside", None)):
        torch.manual_seed(0)
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
        if spec.endswith("zero3"):
            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
        params = list(model)
        opt = memopt.create(params, spec, max_grad_norm=bound)
        norms = []
        for step in range(3):
            give(params, step)
            if spec.endswith("zero3"):
                for p in params:
                    full = torch.zeros(p.shape)
                    torch.manual_seed(step)
                    full.copy_(torch.randn(p.shape))
                    p.grad = distribute_tensor(full, p.device_mesh, p.placements)
            if bound is None:
                norms.append(memopt.clip_grad_norm_(params, BOUND))
            opt.step()
            if bound is not None:
                norms.append(opt.grad_norm)
        bad = params[0].grad.to_local() if spec.endswith("zero3") else params[0].grad
        if dist.get_rank() == 0 or spec.endswith("zero1"):
            bad[0, 0] = math.inf
        opt.step()
        full = [p.full_tensor() if spec.endswith("zero3") else p for p in params]
        found[name] = [x.detach() for x in full], [float(x) for x in norms], opt.skipped_steps
    return found


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize(
    "spec",
    [
        "adamw-8bit/zero1",
        pytest.param("adafactor/zero1", marks=pytest.mark.slow),
        pytest.param("adamw/zero3", marks=pytest.mark.slow),
        "adafactor/zero3",
    ],
)
def test_of_ranks_the_norm_is_that_of_all(spec) -> None:
    found = ranks.run(sharded, 2, spec)
    for rank in found:
        for a, b in zip(rank["inside"][0], rank["outside"][0], strict=True):
            assert_same_bits(a, b)
        assert rank["inside"][1] == rank["outside"][1] == found[0]["inside"][1]
        assert rank["inside"][2] == rank["outside"][2] == 1
