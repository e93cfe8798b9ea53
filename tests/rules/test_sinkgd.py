"""SinkGD: the paper's algorithm, whole columns over the ranks, no state of matrices."""

import math

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers.resumed import check_ranks

#: Matrices of both orientations, a wide one, convolutions of two dimensions and of one, a stack, a tall one.
SHAPES = [(24, 48), (40, 24), (7, 1100), (16, 8, 3, 3), (16, 10, 40), (3, 10, 70), (300, 66)]


def of(shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give(params, step):
    """Gradients over four decades, so that rows and columns have something to be divided by."""
    g = torch.Generator().manual_seed(step)
    for p in params:
        one = torch.randn(p.shape, generator=g) * 10 ** torch.empty(p.shape[0], *[1] * (p.dim() - 1)).uniform_(
            -3, 1, generator=g
        )
        p.grad = (one * 10 ** torch.empty(p.shape[1:]).uniform_(-2, 0, generator=g)).to(p.dtype)


def created(params, spec="sinkgd", **keywords):
    return memopt.create([(f"w{i}", p) for i, p in enumerate(params)], spec, **keywords)


def as_matrices(x):
    """Of a convolution the output channels by all else, of a stack its matrices: from 64 columns on."""
    return [x.flatten(1)] if x.dim() != 3 or x.shape[-1] < 64 else list(x)


def published(x, steps):
    """Algorithm 3 (SR-Sinkhorn) of Scetbon et al. 2025, in fp64 and with the norms written out."""
    x = x.double()
    rows, cols = x.shape
    for _ in range(steps):
        q = torch.diag(1 / x.norm(dim=1))
        x = math.sqrt(cols) * q @ x
        r = torch.diag(1 / x.norm(dim=0))
        x = math.sqrt(rows) * x @ r
    return x


def reference(params, lr, decay, steps, spectral=False):
    """Algorithm 4, and the spectral norm that axolotl's has; decay as AdamW's."""
    for p in params:
        for w, g in zip(as_matrices(p.data), as_matrices(p.grad), strict=True):
            x = published(g, steps)
            if spectral:
                x *= math.sqrt(x.shape[0] / x.shape[1]) / torch.linalg.matrix_norm(x, ord=2)
            w.copy_(w * (1 - lr * decay) - lr * x)


@pytest.mark.parametrize(("steps", "decay"), [(5, 0.0), (1, 0.3)])
def test_fifty_steps_are_the_papers(steps, decay):
    ours, theirs = of(SHAPES), of(SHAPES)
    opt = created(ours, lr=0.01, weight_decay=decay, sinkhorn_steps=steps)
    for t in range(50):
        give(ours, t)
        give(theirs, t)
        opt.step()
        reference(theirs, 0.01, decay, steps)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_rows_and_columns_of_an_update_are_of_one_size():
    (p,) = of([(48, 80)])
    before = p.detach().clone()
    opt = created([p], lr=1.0, sinkhorn_steps=60)
    p.grad = torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    opt.step()
    square = (p.detach() - before).square()
    torch.testing.assert_close(square.mean(0), torch.ones(80), rtol=1e-3, atol=0)
    torch.testing.assert_close(square.mean(1), torch.ones(48), rtol=1e-3, atol=0)


def test_the_spectral_norm_is_that_of_the_singular_values():
    ours, theirs = of(SHAPES), of(SHAPES)
    opt = created(ours, lr=0.1, spectral_steps=99)
    for t in range(3):
        give(ours, t)
        give(theirs, t)
        opt.step()
        reference(theirs, 0.1, 0.0, 5, spectral=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)  # as far as the iteration has come


def test_centred_columns_are_not_where_the_iteration_cannot_begin():
    """Inputs behind a norm add up to zero over the columns: a beginning of ones would have found nothing."""
    (p,) = of([(32, 64)])
    before = p.detach().clone()
    g = torch.randn(32, 1) @ torch.randn(1, 64)
    p.grad = g - g.mean(1, keepdim=True)
    opt = created([p], lr=1.0, sinkhorn_steps=1, spectral_steps=10)
    opt.step()
    assert torch.linalg.matrix_norm(p.detach() - before, ord=2) == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_what_has_no_gradient_stays():
    (p,) = of([(40, 70)])
    before = p.detach().clone()
    opt = created([p], lr=1.0, spectral_steps=3)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p, before)
    p.grad = torch.randn(40, 70)
    p.grad[3], p.grad[:, 5] = 0, 0
    opt.step()
    moved = p.detach() != before
    assert torch.isfinite(p).all()
    assert not moved[3].any()
    assert not moved[:, 5].any()
    assert moved.float().mean() > 0.9


def test_the_size_of_gradients_does_not_matter():
    moved = []
    for size in (1e-12, 1.0, 1e6):
        (p,) = of([(40, 70)])
        before = p.detach().clone()
        p.grad = size * torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
        created([p], lr=1.0).step()
        moved.append(p.detach() - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[2], moved[1], rtol=0, atol=1e-5)


# Ranks ---------------------------------------------------------------------------------------------------------

RUNS = [("sinkgd/zero1", {}), ("sinkgd-8bit(adamw)@host/zero1", {"spectral_steps": 3})]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_step_as_one_process(world):
    """To the bit: columns are summed in fp64, and rounded to fp32 then."""
    check_ranks(world, RUNS)


# Specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: memopt.parse("sinkgd", hyper={"sinkhorn_steps": 0}), "sinkhorn_steps must be an integer from 1"),
        (lambda: memopt.parse("sinkgd", hyper={"spectral_steps": 1.5}), "spectral_steps must be an integer from 0"),
        (lambda: memopt.parse("sinkgd", hyper={"momentum": 0.9}), "sinkgd has no hyperparameter 'momentum'"),
        (lambda: memopt.price({"w": (64, 64)}, "sinkgd", deepspeed=2), "sums columns of matrices"),
        (lambda: memopt.parse("sinkgd-factored"), "no moment of sinkgd has a factored form"),
        (lambda: memopt.parse("lookahead(sinkgd)"), "does not take every parameter"),
        (lambda: created(of([(8,)])), "no parameter is a hidden matrix.*use 'adamw'"),
    ],
)
def test_what_means_nothing_is_one_sentence(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_a_matrix_has_no_state_and_the_fallback_has_its_own():
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 128))
    opt = memopt.create(model, "sinkgd-8bit", lr=1e-3, rules={"adamw": {"lr": 2e-2}})
    assert str(opt.spec) == "sinkgd-8bit(adamw)"
    opt.init_state()
    matrix, embedding = model[1].weight, model[0].weight
    assert opt.state[matrix].keys() == {"step"}
    assert "exp_avg.codes" in opt.state[embedding]
    report = opt.convert_("adamw-8bit", fill={"exp_avg": 0, "exp_avg_sq": 0})
    assert "exp_avg.codes" in opt.state[matrix], report
