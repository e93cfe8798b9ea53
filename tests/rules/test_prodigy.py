"""Prodigy: the paper's algorithm, one estimate over all parameters and ranks, and what it takes in memory."""

import math

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers.cases import assert_same_bits
from tests.helpers.resumed import check_ranks

SHAPES = [(24, 40), (300,), (5, 3), ()]
#: Where steps are so long that fp32 weights resolve the way from where they began to five digits.
D0 = 1e-2


def of(shapes=SHAPES, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def give(params, step):
    """Gradients of a quadratic, so that there is somewhere to go, with noise as large as they are: where a second
    moment is nearly zero a difference would be amplified."""
    g = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (p.detach().float() - 3 + torch.randn(p.shape, generator=g)).to(p.dtype)


def published(params, groups, lr, betas, eps, decay, d0, d_coef=1.0, safeguard=False, corrected=False):
    """Algorithm 4 of Mishchenko & Defazio 2024, in fp64, with the first weights kept; the factor 1 - b3 that n and s
    have in common there is left out."""
    b1, b2 = betas
    b3 = math.sqrt(b2)
    x0 = [p.detach().double().clone() for p in params]
    m, v, s = ([torch.zeros_like(x) for x in x0] for _ in range(3))
    at = {"d": d0, "n": 0.0, "t": 0}

    def step():
        at["t"] += 1
        d = at["d"]
        a = lr * d * (math.sqrt(1 - b2 ** at["t"]) / (1 - b1 ** at["t"]) if corrected else 1)
        n, size = b3 * at["n"], 0.0
        for i, p in enumerate(params):
            g, x = p.grad.double(), p.detach().double()
            n += d / d0 * a * float((g * (x0[i] - x)).sum())
            s[i] = b3 * s[i] + d / d0 * (d if safeguard else a) * g
            size += float(s[i].abs().sum())
            m[i] = b1 * m[i] + (1 - b1) * d * g
            v[i] = b2 * v[i] + (1 - b2) * d * d * g * g
            p.data.copy_(x * (1 - a * decay) - a * m[i] / (v[i].sqrt() + d * eps))
        at["d"], at["n"] = max(d, d_coef * n / size), n
        return at["d"]

    return step


@pytest.mark.parametrize(
    ("options", "hyper"),
    [
        ({}, {}),
        ({"decay": 0.1}, {"weight_decay": 0.1}),
        ({"safeguard": True, "corrected": True}, {"safeguard_warmup": True, "use_bias_correction": True}),
        ({"d_coef": 2.0, "lr": 0.5}, {"d_coef": 2.0, "lr": 0.5}),
    ],
    ids=str,
)
def test_fifty_steps_are_the_papers(options, hyper):
    ours, theirs = of(), of()
    opt = memopt.create(ours, "prodigy", **{"lr": 1.0, "d0": D0, **hyper})
    given = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.0, "d0": D0, **options}
    step = published(theirs, 1, **given)
    for t in range(50):
        give(ours, t)
        give(theirs, t)
        opt.step()
        d = step()
        assert opt.param_groups[0]["d"] == pytest.approx(d, rel=2e-5), t
    assert d > 2 * given["d0"]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def stepped(spec):
    params = of()
    opt = memopt.create(params, spec)
    give(params, 0)
    opt.step()
    return opt


@pytest.mark.parametrize(("d0", "tolerance"), [(D0, 2e-5), (1e-6, 1e-2)])
def test_fifty_steps_are_the_packages(d0, tolerance):
    """With an eps too small to matter, which the package multiplies by the next d. From its own d0 the first steps are
    3e-6 long, of which fp32 weights keep two digits, here and there."""
    prodigyopt = pytest.importorskip("prodigyopt")
    ours, theirs = of(), of()
    opt = memopt.create(ours, "prodigy", lr=1.0, weight_decay=0.01, d0=d0, eps=1e-14)
    reference = prodigyopt.Prodigy(theirs, lr=1.0, weight_decay=0.01, d0=d0, eps=1e-14)
    for t in range(50):
        give(ours, t)
        give(theirs, t)
        opt.step()
        reference.step()
        assert opt.param_groups[0]["d"] == pytest.approx(reference.param_groups[0]["d"], rel=tolerance), t
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=2e-5)


def test_one_estimate_is_of_all_groups_and_is_shown():
    together, apart = of(), of()
    opt = memopt.create(together, "prodigy", d0=1e-3)
    groups = memopt.create([{"params": apart[:1]}, {"params": apart[1:]}], "prodigy", d0=1e-3)
    for t in range(5):
        give(together, t)
        give(apart, t)
        opt.step()
        groups.step()
    d = opt.param_groups[0]["d"]
    assert d > 1e-3
    assert [group["d"] for group in groups.param_groups] == [d, d]
    for p, q in zip(together, apart, strict=True):
        assert_same_bits(p, q)
    assert f"d is {d:.3g}" in opt.explain()
    said = []
    watch = memopt.watch(opt, every=1, out=said.append)
    give(together, 9)
    opt.step()
    assert watch.readings[-1].groups[0].estimate == opt.param_groups[0]["d"]
    watch.close()


def test_a_schedule_that_begins_at_zero_moves_nothing_and_finds_nothing():
    params = of()
    before = [p.detach().clone() for p in params]
    opt = memopt.create(params, "prodigy", lr=0.0)
    give(params, 0)
    opt.step()
    assert opt.param_groups[0]["d"] == 1e-6
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    opt.param_groups[0]["lr"] = 1.0
    for t in range(20):
        give(params, t)
        opt.step()
    assert opt.param_groups[0]["d"] > 1e-5


@pytest.mark.parametrize("spec", ["prodigy", "prodigy-8bit", "prodigy-8bit.factored"])
def test_it_goes_on_where_it_was_saved(spec, tmp_path):
    params, others = of(), of()
    opt = memopt.create(params, spec, d0=1e-3)
    for t in range(3):
        give(params, t)
        opt.step()
    memopt.save(tmp_path / "saved", optimizer=opt)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    resumed = memopt.create(others, spec)
    memopt.load(tmp_path / "saved", optimizer=resumed)
    assert resumed.param_groups[0]["d"] == opt.param_groups[0]["d"]
    for t in range(3, 6):
        for some, one in ((params, opt), (others, resumed)):
            give(some, t)
            one.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
    assert resumed.param_groups[0]["d"] == opt.param_groups[0]["d"]


def test_released_gradients_step_as_the_plain_step():
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 1))
        opt = memopt.create(model, "prodigy", d0=1e-3)
        if released:
            opt.release_gradients(model)
        for t in range(4):
            data = torch.randn(8, 20, generator=torch.Generator().manual_seed(t))
            (model(data) - 5).square().mean().backward()
            opt.step()
            opt.zero_grad()
        found.append((opt.param_groups[0]["d"], [p.detach() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][0] > 1e-3
    for p, q in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_skipped_step_finds_nothing():
    params = of()
    opt = memopt.create(params, "prodigy", d0=1e-3)
    give(params, 0)
    params[0].grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="NaN or Inf"):
        opt.step()
    assert opt.param_groups[0]["d"] is None
    give(params, 0)
    opt.step()
    give(params, 1)
    opt.step()
    assert math.isfinite(opt.param_groups[0]["d"])


# Ranks ---------------------------------------------------------------------------------------------------------

RUNS = [("prodigy/zero1", {"d0": 1e-3}), ("prodigy-8bit@host/zero1", {"d0": 1e-3, "sliced": True})]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_step_as_one_process(world):
    check_ranks(world, RUNS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: memopt.parse("prodigy", hyper={"d0": 0}), "d0 must be a finite number > 0"),
        (lambda: memopt.parse("prodigy", hyper={"sliced": 11}), "sliced must be True or False"),
        (lambda: memopt.parse("prodigy", hyper={"slice_p": 11}), "prodigy has no hyperparameter 'slice_p'"),
        (lambda: memopt.price({"w": (64, 64)}, "prodigy", deepspeed=2), "DeepSpeed steps its vectors one by one"),
        (lambda: memopt.parse("prodigy", hyper={"cautious": True}), "cautious=True is not allowed"),
        (lambda: memopt.parse("lookahead(prodigy)"), "prodigy follows its own steps"),
        (
            lambda: stepped("adamw").convert_("prodigy"),
            "prodigy needs 'exp_avg' and in adamw it is a mean of gradients",
        ),
    ],
)
def test_what_means_nothing_is_one_sentence(make, words):
    with pytest.raises(SpecError, match=words):
        make()
