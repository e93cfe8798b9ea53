"""APOLLO: the paper's algorithm in random projections that nobody keeps, the same on any number of ranks."""

import math

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.rules.apollo import gaussian
from tests.helpers.resumed import check_ranks
from tests.rules.test_sinkgd import as_matrices, give, of

#: Wide and high matrices, convolutions of two dimensions and of one, a stack, one with a side under the rank.
SHAPES = [(24, 48), (40, 24), (7, 300), (16, 8, 3, 3), (16, 10, 4), (3, 10, 70)]
RANK = 8
CASES = [
    {"projection_rank": RANK, "update_proj_gap": 20},
    {"projection_rank": RANK, "weight_decay": 0.1, "norm_growth": 0, "betas": (0.8, 0.9), "scale": 2.0},
    {"projection_rank": RANK, "scale_type": "tensor", "update_proj_gap": 1},
]


def created(params, spec="apollo", **keywords):
    return memopt.create([(f"w{i}", p) for i, p in enumerate(params)], spec, **keywords)


class Published:
    """Algorithm 1 of Zhu et al. 2025 for one matrix, in fp64, with the norm-growth limiter and AdamW's bias
    corrections; ``draw(t)`` is P [rank, shorter side]."""

    def __init__(self, draw, lr, rank, scale, scale_type, betas=(0.9, 0.999), eps=1e-8, decay=0.0, growth=1.01):
        self.draw, self.lr, self.scale, self.kind = draw, lr, scale, scale_type
        self.betas, self.eps, self.decay, self.growth = betas, eps, decay, growth
        self.m = self.v = 0.0
        self.before = 0.0
        self.t = 0

    def step(self, w, g):
        if g.shape[0] >= g.shape[1]:  # "m <= n"; of a square as the authors' package
            return self.step(w.T, g.T)
        self.t += 1
        g = g.double()
        r = self.draw(self.t).double() @ g
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r * r
        n = self.m / (self.v.sqrt() + self.eps)
        if self.kind == "channel":
            s = n.norm(dim=0) / r.norm(dim=0)
            u = self.scale * g @ torch.diag(s)
        else:
            u = self.scale * g * n.norm() / r.norm()
        if self.growth and self.before and u.norm() / self.before > self.growth:
            u = u / u.norm() * self.growth * self.before
        self.before = u.norm()
        corrected = math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        w.copy_(w * (1 - self.lr * self.decay) - self.lr * corrected * u)


@pytest.mark.parametrize("hyper", CASES, ids=str)
def test_fifty_steps_are_the_papers(hyper):
    ours, theirs = of(SHAPES), of(SHAPES)
    opt = created(ours, lr=0.01, **hyper)
    # Of the projections alone the tests take ours: there are as many as seeds.
    drawn = []
    for i, p in enumerate(ours):
        for x in as_matrices(p):
            side = min(x.shape)

            def draw(t, i=i, side=side):
                key = key_of(opt, i, (t - 1) // opt.param_groups[0]["update_proj_gap"])
                return gaussian(key, min(RANK, side), "cpu")(0, side)

            given = {"decay": hyper.get("weight_decay", 0.0), "growth": hyper.get("norm_growth", 1.01)}
            betas = hyper.get("betas", (0.9, 0.999))
            kind = hyper.get("scale_type", "channel")
            drawn.append((i, Published(draw, 0.01, RANK, hyper.get("scale", 1.0), kind, betas, **given)))
    for t in range(50):
        give(ours, t)
        give(theirs, t)
        opt.step()
        matrices = [x for p in theirs for x in zip(as_matrices(p.data), as_matrices(p.grad), strict=True)]
        for (_, rule), (w, g) in zip(drawn, matrices, strict=True):
            rule.step(w, g)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def key_of(opt, index, drawn):
    """What the parameter draws its projection from."""
    from memopt.core import dither
    from memopt.engines.native import DRAWN

    return dither.key(dither.key(opt.setup.seed, index, DRAWN), drawn)


def test_projections_are_normal_and_drawn_anew():
    """Mean, variance, fourth moment, and that P keeps lengths (what the paper's theorem asks for); rows, columns, keys
    apart from one another."""
    p = gaussian(1, 256, "cpu")(0, 2000) * math.sqrt(256)
    assert abs(float(p.mean())) < 5 / math.sqrt(p.numel())
    assert float(p.square().mean()) == pytest.approx(1, abs=0.01)
    assert float(p.pow(4).mean()) == pytest.approx(3, abs=0.05)
    for shifted in (p[:, 1:] * p[:, :-1], p[1:] * p[:-1], p * gaussian(2, 256, "cpu")(0, 2000) * 16):
        assert abs(float(shifted.mean())) < 5 / math.sqrt(p.numel())
    x = torch.randn(2000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = (p / 16 @ x).norm(dim=0) / x.norm(dim=0)
    assert (kept - 1).abs().max() < 5 / math.sqrt(2 * 256)
    assert torch.equal(gaussian(1, 256, "cpu")(700, 900), p[:, 700:900] / 16)


def test_nothing_of_a_projection_is_kept():
    (p,) = of([(64, 300)])
    opt = created([p], "apollo-8bit", projection_rank=16)
    give([p], 0)
    opt.step()
    assert {key: tuple(x.shape) for key, x in opt.state[p].items()} == {
        "step": (),
        "projected_avg.codes": (16, 300),
        "projected_avg.scales": (16, 2),
        "projected_avg_sq.codes": (16, 300),
        "projected_avg_sq.scales": (16, 2),
        "update_norm": (1, 1, 1),
    }
    assert opt.ledger().nbytes == memopt.price({"w0": (64, 300)}, "apollo-8bit", projection_rank=16).nbytes


def test_mini_is_of_rank_1_and_an_alias():
    (p,) = of([(64, 300)])
    opt = created([p], "apollo-mini")
    assert str(opt.spec) == "apollomini(adamw)"
    assert opt.param_groups[0]["scale_type"] == "tensor"
    give([p], 0)
    opt.step()
    assert opt.ledger().nbytes == 4 + 2 * 4 * 300 + 4


@pytest.mark.parametrize(("spec", "most"), [("apollo-bf16", 0.02), ("apollo-8bit", 0.05), ("apollo-4bit", 0.3)])
def test_moments_in_few_bits_are_near(spec, most):
    """Of 32 bits, after 20 steps of one gradient with some noise: how far the weights have gone."""
    found = []
    for one in ("apollo", spec):
        params = of([(96, 400), (400, 96)])
        begun = [p.detach().clone() for p in params]
        opt = created(params, one, lr=0.01, projection_rank=64)
        for t in range(20):
            g = torch.Generator().manual_seed(t)
            for i, p in enumerate(params):
                steady = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i))
                p.grad = steady + 0.3 * torch.randn(p.shape, generator=g)
            opt.step()
        found.append([p.detach() - x for p, x in zip(params, begun, strict=True)])
    for exact, rounded in zip(*found, strict=True):
        assert float((rounded - exact).norm() / exact.norm()) < most


RUNS = [
    ("apollo-8bit/zero1", {"projection_rank": 64, "update_proj_gap": 2}),
    ("apollo-4bit@host/zero1", {"projection_rank": 32, "scale_type": "tensor", "weight_decay": 0.1}),
]


@pytest.mark.parametrize("world", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 3])
def test_ranks_step_as_one_process(world):
    check_ranks(world, RUNS)


def test_threads_change_no_bit():
    found = []
    for threads in (1, 2):
        params = of([(200, 700), (700, 200)])
        opt = created(params, projection_rank=64)
        for t in range(2):
            give(params, t)
            torch.set_num_threads(threads)
            opt.step()
            torch.set_num_threads(1)
        found.append(params)
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


def test_channels_without_a_gradient_stay_where_they_are():
    params = of([(8, 20), (20, 8)])
    before = [p.detach().clone() for p in params]
    opt = created(params, lr=0.1, projection_rank=4)
    for t in range(3):
        give(params, t)
        params[0].grad[:, 3] = 0
        params[1].grad[5] = 0
        opt.step()
    assert torch.equal(params[0][:, 3], before[0][:, 3])
    assert torch.equal(params[1][5], before[1][5])
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(p.isfinite().all() for p in params)


def test_conversion_says_what_it_cannot_take_along():
    params = of([(64, 300), (300, 64)])
    opt = created(params, "apollo-8bit", projection_rank=64)
    give(params, 0)
    opt.step()
    before = {key: x.clone() for key, x in opt.state[params[0]].items()}
    opt.convert_("apollo")
    assert opt.state[params[0]]["projected_avg"].shape == (64, 300)
    opt.convert_("apollo-8bit")
    assert torch.equal(opt.state[params[0]]["projected_avg.codes"], before["projected_avg.codes"])
    with pytest.raises(ValueError, match=r"stored as rank64-8bit, of shape \[64, 300\], and is to be rank32-8bit"):
        opt.convert_("apollo-8bit", projection_rank=32)
    opt.convert_("apollo-8bit", projection_rank=32, fill={"projected_avg": 0, "projected_avg_sq": 0, "step": 0})
    give(params, 1)
    opt.step()
    with pytest.raises(SpecError, match="adamw needs 'exp_avg' and apollo does not keep it"):
        opt.convert_("adamw-8bit")
    opt.convert_("adamw-8bit", fill={"exp_avg": 0, "exp_avg_sq": 0, "step": 0})
    with pytest.raises(SpecError, match="apollo needs 'projected_avg' and adamw does not keep it"):
        opt.convert_("apollo")


def test_rows_of_a_projected_matrix_cannot_be_taken_along():
    (p,) = of([(64, 300)])
    opt = created([p], projection_rank=8)
    give([p], 0)
    opt.step()
    with pytest.raises(ValueError, match="w0: projected_avg is of a projection of the whole matrix"):
        opt.append_rows(p, torch.zeros(2, 300))


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"projection_rank": 0}, "projection_rank must be an integer from 1 to 999999"),
        ({"scale_type": "row"}, "'channel' or 'tensor'"),
        ({"norm_growth": 0.9}, "a finite number > 1, or 0 for no limit"),
        ({"update_proj_gap": 0}, "an integer >= 1"),
        ({"scale": 0.0}, "a finite number > 0"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(hyper, words):
    with pytest.raises(SpecError, match=words):
        created(of([(8, 8)]), **hyper)
    with pytest.raises(SpecError, match="no moment of apollo has a factored form"):
        created(of([(8, 8)]), "apollo-factored")


def test_a_rank_that_is_changed_by_hand_does_not_fit_its_state():
    (p,) = of([(64, 300)])
    opt = created([p], projection_rank=8)
    give([p], 0)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0]["projection_rank"] = 16
    with pytest.raises(RuntimeError, match="projected_avg"):
        opt.step()
    assert torch.equal(p, before)


def test_a_checkpoint_is_loaded_under_other_formats(tmp_path):
    params = of([(64, 300), (300, 64), (3, 20, 80)])
    opt = created(params, "apollo-8bit", projection_rank=64)
    for t in range(2):
        give(params, t)
        opt.step()
    memopt.save(tmp_path / "saved", optimizer=opt)
    others = of([(64, 300), (300, 64), (3, 20, 80)])
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    same = created(others, "apollo-8bit", projection_rank=64)
    memopt.load(tmp_path / "saved", optimizer=same)
    give(params, 2)
    give(others, 2)
    opt.step()
    same.step()
    for p, q in zip(others, params, strict=True):
        assert torch.equal(p, q)
    wider = created(others, "apollo-32bit", projection_rank=64)
    memopt.load(tmp_path / "saved", optimizer=wider)
    assert wider.state[others[0]]["projected_avg"].shape == (64, 300)
    assert wider.state[others[1]]["projected_avg"].shape == (300, 64)
    assert wider.state[others[2]]["projected_avg"].shape == (3, 20, 80)
    assert float(wider.state[others[1]]["update_norm"]) > 0
