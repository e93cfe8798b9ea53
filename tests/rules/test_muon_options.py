"""NorMuon's second moment of rows, and matrices that are several."""

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.kernels.newton_schulz import newton_schulz
from memopt.rules import RULES

DEFAULTS = RULES["muon"].hyperparameters


def stepped(params, spec, steps=3, **hyper):
    """A few steps on gradients of the parameters' places."""
    opt = memopt.create([(f"w{i}", p) for i, p in enumerate(params)], spec, lr=0.05, **hyper)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + step)).to(p.dtype)
        opt.step()
    return opt


def normuon(p, g, m, v, lr, momentum=0.95, beta2=0.95):
    """As its authors have it, with torch's order of the momentum and of the decay."""
    m.lerp_(g, 1 - momentum)
    x = newton_schulz(g.lerp(m, momentum)[None].bfloat16(), {**DEFAULTS, "ns_dtype": "bfloat16"})[0].float()
    v.lerp_(x.square().mean(-1, keepdim=True), 1 - beta2)
    y = x / v.sqrt().add(1e-10)
    y *= x.norm() / y.norm().add(1e-10)
    p.mul_(1 - lr * 0.1).sub_(y, alpha=lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


@pytest.mark.parametrize("shape", [(32, 80), (80, 32)])
def test_a_second_moment_of_rows_is_normuons(shape):
    ours = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs, m, v = ours.detach().clone(), torch.zeros(shape), torch.zeros(shape[0], 1)
    opt = stepped([ours], "muon", 10, beta2=0.95, ns_dtype="bfloat16", adjust_lr_fn="original")
    for step in range(10):
        normuon(theirs, torch.randn(shape, generator=torch.Generator().manual_seed(step)), m, v, 0.05)
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(opt.state[ours]["row_sq"], v)
    assert opt.ledger() == memopt.price([("w0", ours)], "muon", beta2=0.95)


@pytest.mark.parametrize("hyper", [{}, {"adjust_lr_fn": "original"}])
@pytest.mark.parametrize("heights", [3, (48, 16, 16), (96, 16)])
def test_a_fused_matrix_steps_as_its_parts(heights, hyper):
    rows = 80 if isinstance(heights, tuple) and sum(heights) == 80 else 96 if heights == 3 else sum(heights)
    fused = torch.nn.Parameter(torch.randn(rows, 24, generator=torch.Generator().manual_seed(0)))
    sizes = [rows // 3] * 3 if heights == 3 else list(heights)
    parts = [torch.nn.Parameter(x.clone()) for x in fused.detach().split(sizes)]
    g = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))
    groups = [{"params": [("qkv", fused)], "split_rows": heights}]
    one = memopt.create(groups, "muon", lr=0.05, ns_dtype="float32", **hyper)
    each = memopt.create([(f"p{i}", p) for i, p in enumerate(parts)], "muon", lr=0.05, ns_dtype="float32", **hyper)
    fused.grad = g.clone()
    for p, part in zip(parts, g.split(sizes), strict=True):
        p.grad = part.clone()
    one.step()
    each.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=1e-5)
    with pytest.raises(SpecError, match="parameter 0 of its group: split_rows=5"):
        one.add_param_group({"params": [torch.nn.Parameter(torch.ones(8, 8))], "rule": "muon", "split_rows": 5})
