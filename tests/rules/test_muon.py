"""Muon: torch.optim.Muon's steps to the bit, fewer products for wide matrices, whole matrices wherever their rows
are."""

import pytest
import torch

import memopt
from memopt.checkpoint import export, source_of
from memopt.core.hyperparameters import SpecError
from memopt.kernels import newton_schulz as newton_schulz_module
from memopt.kernels.newton_schulz import newton_schulz
from memopt.rules import RULES
from memopt.rules.matrices import matrices
from tests.helpers.resumed import check_ranks

DEFAULTS = RULES["muon"].hyperparameters
#: Products in bfloat16 leave an error of a per cent and a half (measured: 0.0103 to 0.0117 of torch's order), fewer of
#: them up to twice that; in fp32 it is that of sums of a thousand products.
BF16, FP32 = 0.03, 1e-4


def pair(shape, **hyper):
    """The same matrix with ours and with torch's optimizer."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    given = {"adjust_lr_fn": "original", "ns_dtype": "bfloat16", **hyper}
    return (
        ours,
        memopt.create([("w", ours)], "muon", lr=0.02, **given),
        theirs,
        torch.optim.Muon([theirs], 0.02, **hyper),
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(10, 5), (5, 10), (64, 64), (40, 96)])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"weight_decay": 0.2},
        {"weight_decay": 0.2, "momentum": 0.8},
        {"weight_decay": 0.2, "nesterov": False},
        {"weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 3, "ns_coefficients": (3.4, -4.7, 2.0), "eps": 1e-5},
    ],
    ids=str,
)
def test_fifty_steps_are_torchs_to_the_bit(shape, hyper):
    ours, opt, theirs, reference = pair(shape, **hyper)
    for step in range(50):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = g.clone(), g.clone()
        opt.step()
        reference.step()
    assert (ours - theirs).abs().max() <= 1e-6
    assert torch.equal(opt.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def exact(x, h):
    """The iteration in fp64, as it is written."""
    a, b, c = h["ns_coefficients"]
    x = x.double()
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(h["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 40, 160), (2, 160, 40), (1, 64, 65)])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_products_are_the_same_iteration(shape, steps, dtype):
    h = {**DEFAULTS, "ns_steps": steps}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = exact(x, h)
    found = newton_schulz(x.to(dtype), h)
    assert found.shape == x.shape
    expected = expected.mT if shape[1] > shape[2] else expected
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= (BF16 if dtype is torch.bfloat16 else FP32)


def test_a_matrix_of_small_singular_values_is_no_worse_in_fewer_products():
    """They grow by a power of a, and with them what is rounded in the Gram matrix: three iterations at a time."""
    u, _, v = torch.linalg.svd(torch.randn(64, 192, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = (u @ torch.diag(torch.logspace(0, -4, 64)) @ v)[None]
    expected = exact(x, DEFAULTS)
    errors = [
        (newton_schulz(x.bfloat16(), {**DEFAULTS, "ns_dtype": name}).double() - expected).norm()
        for name in ("auto", "bfloat16")
    ]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("shape", [(1, 520, 520), (1, 512, 800), (1, 800, 512)])
def test_on_two_threads_halves_are_the_whole(shape, monkeypatch):
    """A product in halves of its rows is the same sums."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = []
    for alone in (range(0), newton_schulz_module.ALONE):
        monkeypatch.setattr(newton_schulz_module, "ALONE", alone)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        made.append(newton_schulz(x.clone(), {**DEFAULTS, "ns_steps": 2}))
    torch.testing.assert_close(*made, rtol=0, atol=1e-3)


def test_convolutions_are_flattened_and_experts_are_stacked():
    assert matrices((64, 32, 3, 3))[:3] == (1, 64, 288)
    assert matrices((64, 32, 5))[:3] == (1, 64, 160)
    assert matrices((4, 96, 64))[:3] == (4, 96, 64)
    stack = torch.nn.Parameter(torch.randn(3, 48, 64))
    alone = [torch.nn.Parameter(x.detach().clone()) for x in stack]
    opt = memopt.create([("experts", stack)], "muon")
    other = memopt.create([(f"expert{i}", p) for i, p in enumerate(alone)], "muon")
    g = torch.randn(3, 48, 64)
    stack.grad = g.clone()
    for p, part in zip(alone, g, strict=True):
        p.grad = part.clone()
    opt.step()
    other.step()
    for mine, p in zip(stack, alone, strict=True):
        torch.testing.assert_close(mine, p, rtol=0, atol=1e-6)


def test_a_gradient_of_zero_moves_nothing_but_the_decay():
    p = torch.nn.Parameter(torch.ones(8, 8))
    opt = memopt.create([("w", p)], "muon", lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(8, 8)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((8, 8), 0.95))


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"ns_steps": 0}, "ns_steps must be an integer from 1 to 99"),
        ({"ns_coefficients": (1.0, 2.0)}, "three finite numbers"),
        ({"adjust_lr_fn": "rms"}, "'original', 'match_rms_adamw', 'spectral_norm' or 'none'"),
        ({"ns_dtype": "float16"}, "'auto', 'bfloat16' or 'float32'"),
        ({"momentum": 1.0}, r"a number in \[0, 1\)"),
        ({"betas": (0.9, 0.95)}, "muon has no hyperparameter 'betas'"),
        ({"beta2": 1.0}, r"beta2 must be a number in \[0, 1\)"),
        ({"split_rows": 1}, "split_rows must be None, an integer >= 2 or row counts"),
        ({"split_rows": 3}, "w: split_rows=3: a matrix of 4 rows does not split into 3 equal parts"),
        ({"split_rows": (3, 2)}, r"w: .*a matrix of 4 rows does not split into rows \(3, 2\), which are 5"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(hyper, words):
    with pytest.raises(SpecError, match=words):
        memopt.create([("w", torch.nn.Parameter(torch.ones(4, 4)))], "muon", **hyper)


def stepped(params, spec, steps=3, **hyper):
    """A few steps on gradients of the parameters' places."""
    opt = memopt.create([(f"w{i}", p) for i, p in enumerate(params)], spec, lr=0.05, **hyper)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + step)).to(p.dtype)
        opt.step()
    return opt


SHAPES = [(48, 64), (64, 48), (40, 160), (160, 40), (72, 64), (4, 96, 64), (24, 8, 3, 3), (48, 64)]


@pytest.mark.parametrize(
    ("spec", "dtype", "hyper"),
    [
        ("muon", torch.float32, {}),
        ("muon", torch.float32, {"nesterov": False, "maximize": True, "momentum": 0.3, "ns_dtype": "float32"}),
        ("muon-8bit", torch.float32, {"weight_decay": 0.5}),
        ("muon-4bit", torch.float32, {}),
        ("muon-bf16+kahan", torch.bfloat16, {}),
        ("muon-fp8+stochastic", torch.bfloat16, {}),
        ("muon-8bit+split", torch.float16, {}),
    ],
    ids=str,
)
def test_kernels_step_as_the_plain_path(spec, dtype, hyper, monkeypatch):
    """Momentum, rounding and random bits to the bit or a tie of it, whatever is batched; weights as far as one rounding
    of an update to bfloat16 goes."""
    from memopt.kernels import loader

    def run():
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype))
            for i, shape in enumerate(SHAPES)
        ]
        return params, stepped(params, spec, **hyper)

    fast, opt = run()
    assert "stepped by" not in opt.explain()
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    plain, other = run()
    for p, q in zip(fast, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02 * 0.05 if dtype is torch.float32 else 0.05)
        for key, value in opt.state[p].items():
            a, b = value.float(), other.state[q][key].float()
            if key.startswith("momentum_buffer"):
                assert ((a - b).abs() > 1e-6 * b.abs().max()).sum() <= 3, key
    if dtype is torch.float32 and hyper.get("ns_dtype") == "float32":
        assert max(float((p - q).detach().abs().max()) for p, q in zip(fast, plain, strict=True)) < 1e-5


def test_stepped_by_kernels_or_it_is_said():
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
    assert "plain torch path: the kernels take fp32, bf16 and fp16" in memopt.create([("w", p)], "muon").explain()
    p = torch.nn.Parameter(torch.ones(8, 8))
    said = memopt.create([("w", p)], "muon", beta2=0.95).explain()
    assert "there is no kernel for muon with momentum_buffer, row_sq" in said


# Ranks ---------------------------------------------------------------------------------------------------------


RUNS = [
    ("muon/zero1", {}),
    ("muon-8bit/zero1", {}),
    ("muon-4bit(adamw-8bit)@host/zero1", {}),
    ("muon-8bit/zero1", {"beta2": 0.95}),
]


@pytest.mark.parametrize("world", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 3])
def test_ranks_step_as_one_process(world):
    """To the bit: each matrix is multiplied whole, on one rank."""
    check_ranks(world, RUNS)


# torch's state -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_torchs_state_goes_in_and_out():
    ours, opt, theirs, reference = pair((24, 40))
    for step in range(3):
        theirs.grad = torch.randn((24, 40), generator=torch.Generator().manual_seed(step))
        reference.step()
    with torch.no_grad():
        ours.copy_(theirs)
    memopt.load(reference.state_dict(), optimizer=opt)
    assert opt.param_groups[0]["adjust_lr_fn"] == "original"
    assert torch.equal(opt.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])
    opt.param_groups[0]["ns_dtype"] = "bfloat16"
    ours.grad = theirs.grad.clone()
    opt.step()
    reference.step()
    assert torch.equal(ours, theirs)
    back = torch.nn.Parameter(ours.detach().clone())
    again = torch.optim.Muon([back], 0.5)
    again.load_state_dict(export(source_of(opt), "torch"))
    assert again.param_groups[0]["lr"] == 0.02
    assert torch.equal(again.state[back]["momentum_buffer"], opt.state[ours]["momentum_buffer"])
