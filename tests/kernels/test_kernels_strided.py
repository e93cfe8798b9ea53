"""Parameters and gradients that are not contiguous: the same bits as the same numbers side by side."""

from __future__ import annotations

import pytest
import torch

import memopt
from memopt import kernels
from memopt.kernels.pack import dense
from memopt.placements.gradients.checks import non_finite

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.missing()}")

SPECS = ["adamw", "adamw-bf16", "adamw-8bit", "lion-fp8", "adam-4bit", "adafactor", "came", "came-8bit"]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x), 1)[:, x.shape[1] :]


def every_other(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 1]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and not aligned to a vector."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS = [transposed, sliced, every_other, shifted, channels_last]


def after(spec, shape, dtype, lay_p, lay_g):
    torch.manual_seed(0)
    p = torch.nn.Parameter(lay_p(torch.randn(shape).to(dtype)))
    opt = memopt.create([p], spec)
    for _ in range(3):
        p.grad = lay_g(torch.randn(shape).to(dtype))
        opt.step()
    return p.detach().contiguous(), opt


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lay", LAYOUTS, ids=lambda lay: lay.__name__)
def test_the_same_bits_as_contiguous(spec, lay) -> None:
    for shape in [(70, 1300), (9, 20, 3, 5)]:
        for dtype in (torch.float32, torch.bfloat16):
            expected, _ = after(spec, shape, dtype, as_it_is, as_it_is)
            for lay_p, lay_g in [(lay, lay), (lay, as_it_is), (as_it_is, lay)]:
                got, opt = after(spec, shape, dtype, lay_p, lay_g)
                assert torch.equal(expected, got)
                assert "plain torch path" not in opt.explain()


@pytest.mark.parametrize("spec", ["adamw-8bit+split", "adamw-8bit+stochastic", "adamw+kahan", "lion-4bit+fp32"])
def test_masters(spec) -> None:
    expected, _ = after(spec, (70, 1300), torch.bfloat16, as_it_is, as_it_is)
    got, _ = after(spec, (70, 1300), torch.bfloat16, transposed, transposed)
    assert torch.equal(expected, got)


def test_a_plan_is_kept_and_sees_another_layout() -> None:
    p = torch.nn.Parameter(transposed(torch.randn(64, 80)))
    opt = memopt.create([p], "adamw-8bit")
    lay = {True: transposed, False: as_it_is}
    plans = []
    for turned in (True, True, True, False, False):
        p.grad = lay[turned](torch.randn(64, 80))
        opt.step()
        plans.append(opt.stepper.plan)
    assert plans[0] is plans[1] is plans[2] is not None
    assert plans[3] is not plans[2]
    assert plans[4] is plans[3] is not None
    p.grad = transposed(torch.full((64, 80), float("nan")))
    with pytest.warns(UserWarning, match="NaN"):
        opt.step()
    assert opt.skipped_steps == 1
    assert p.isfinite().all()


def test_state_that_is_not_contiguous_is_made_so() -> None:
    torch.manual_seed(0)
    given_up, p, alone = (torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 80), (40, 30), (40, 30)))
    given_up.data = transposed(given_up.data)
    opt, other = memopt.create([given_up, p], "adamw"), memopt.create([alone], "adamw")
    opt.init_state()
    opt.state[given_up]["exp_avg_sq"] = transposed(torch.zeros(64, 80))
    for _ in range(2):
        given_up.grad, p.grad = torch.randn(64, 80), torch.randn(40, 30)
        alone.grad = p.grad.clone()
        opt.step()
        other.step()
    assert torch.equal(p, alone)
    assert (given_up != 1).all()


def test_an_expanded_gradient() -> None:
    """What ``p.sum().backward()`` leaves: one number, seen from everywhere."""
    p, q = (torch.nn.Parameter(torch.ones(30, 300)) for _ in range(2))
    for x, grad in ((p, torch.ones(1, 1).expand(30, 300)), (q, torch.ones(30, 300))):
        opt = memopt.create([x], "adamw-8bit")
        for _ in range(3):
            x.grad = grad
            opt.step()
    assert torch.equal(p, q)


def test_elements_in_one_place_are_refused_as_torch_refuses_them() -> None:
    p = torch.nn.Parameter(torch.ones(1, 4).expand(3, 4))
    opt = memopt.create([p], "adamw")
    p.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        opt.step()


def test_dense() -> None:
    x = torch.randn(6, 4, 5, 3)
    assert all(dense(y) for y in (x, x.permute(2, 0, 3, 1), channels_last(x), x[:1].transpose(1, 2), torch.ones(())))
    assert not any(dense(y) for y in (x[:, :2], x[..., ::2], torch.ones(1).expand(5)))
    for lay in LAYOUTS:
        g = lay(torch.randn(6, 4, 5, 3))
        assert non_finite([("g", g)]) == []
        g[5, 3, 4, 2] = float("nan")
        assert non_finite([("g", g)]) == ["g"]
