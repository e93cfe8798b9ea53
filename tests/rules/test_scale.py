"""SCALE: outputs of one size, momentum on the head alone, embeddings the other way round, a fallback for vectors."""

import math

import pytest
import torch
from torch import nn

import estimators
import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits

RATE, DECAY, BETA = 0.01, 0.1, 0.9


class Model(nn.Module):
    """An embedding, a stack, a convolution, two hidden matrices, a norm and a head."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(40, 24)
        self.experts = nn.Parameter(torch.randn(3, 10, 70, generator=g))
        self.conv = nn.Conv2d(8, 16, 3, bias=False)
        self.up = nn.Linear(24, 300)
        self.down = nn.Linear(300, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 40, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def give(self, step):
        g = torch.Generator().manual_seed(100 + step)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=g) * 10 ** torch.empty(p.shape[0]).uniform_(
                -3, 1, generator=g
            ).view(-1, *[1] * (p.dim() - 1))


class Published:
    """Algorithm 1 of Glentis et al. 2025, in fp64 and with the norms written out; its matrices are [inputs, outputs],
    so that a linear layer's weight is one turned over."""

    def __init__(self, model):
        self.model = model
        self.momentum = torch.zeros_like(model.lm_head.weight, dtype=torch.float64)

    def step(self, lr, decay, beta):
        for name, p in self.model.named_parameters():
            g = p.grad.double()
            if p.dim() < 2:
                continue
            if name == "lm_head.weight":
                self.momentum = g = beta * self.momentum + (1 - beta) * g
            if name == "embed.weight":
                u = self.by_columns(g)
            elif name == "experts":
                u = torch.stack([self.by_columns(one.T).T for one in g])
            else:
                u = self.by_columns(g.flatten(1).T).T.view(g.shape)
            p.data.copy_(p.double() * (1 - lr * decay) - lr * u)

    @staticmethod
    def by_columns(x):
        return math.sqrt(len(x)) * x @ torch.diag(1 / x.norm(dim=0))


@pytest.mark.parametrize("beta", [BETA, 0.0])
def test_fifty_steps_are_the_papers(beta):
    ours, theirs = Model(), Model()
    opt = memopt.create(ours, "scale", lr=RATE, weight_decay=DECAY, rules={"scale_head": {"momentum": beta}})
    reference = Published(theirs)
    for step in range(50):
        ours.give(step)
        theirs.give(step)
        opt.step()
        reference.step(RATE, DECAY, beta)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.dim() > 1:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_vectors_are_the_fallbacks():
    ours, theirs = Model(), Model()
    opt = memopt.create(ours, "scale(adamw)", lr=RATE, weight_decay=DECAY)
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(vectors, lr=RATE, weight_decay=DECAY)
    for step in range(5):
        ours.give(step)
        theirs.give(step)
        opt.step()
        reference.step()
    for p, q in zip([p for p in ours.parameters() if p.dim() < 2], vectors, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_who_is_what():
    model = Model()
    opt = memopt.create(model, "scale-8bit", lr=1e-3, rules={"adamw": {"lr": 3e-4}})
    assert str(opt.spec) == "scale-8bit(adamw)"
    opt.init_state()
    rules = {name: opt.spec.rule_of(group) for name, _, group in opt.params.entries()}
    assert rules["embed.weight"] == "scale_embedding"
    assert rules["lm_head.weight"] == "scale_head"
    assert {rules[name] for name in ("up.weight", "down.weight", "conv.weight", "experts")} == {"scale"}
    assert {rules[name] for name in ("up.bias", "norm.weight", "norm.bias")} == {"adamw"}
    assert opt.state[model.up.weight].keys() == opt.state[model.embed.weight].keys() == {"step"}
    assert opt.state[model.lm_head.weight].keys() == {"step", "exp_avg"}  # 960 elements stay in 32 bits
    assert {group["rule"]: group["lr"] for group in opt.param_groups} == {
        "scale": 1e-3,
        "scale_head": 1e-3,
        "scale_embedding": 1e-3,
        "adamw": 3e-4,
    }
    assert memopt.price(model, "scale-8bit") == opt.ledger()
    assert "plain torch path" in opt.explain()


def test_bytes_of_a_whole_model():
    """The momentum of the head, and the moments of norms."""
    shapes = dict(estimators.resolve("llama-3.1-8b").shapes)
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    for spec, most in (("scale", 0.27), ("scale-8bit", 0.07)):
        assert memopt.price(shapes, spec).nbytes <= most * numel, spec


def test_what_has_no_gradient_stays():
    model = Model()
    opt = memopt.create(model, "scale", lr=1.0)
    model.give(0)
    model.up.weight.grad[3] = 0
    model.embed.weight.grad[:, 5] = 0
    before = model.up.weight.detach().clone(), model.embed.weight.detach().clone()
    opt.step()
    assert torch.equal(model.up.weight[3], before[0][3])
    assert torch.equal(model.embed.weight[:, 5], before[1][:, 5])
    assert all(p.isfinite().all() for p in model.parameters())


# Ranks, saving and changing ------------------------------------------------------------------------------------


def run(spec):
    model = Model()
    opt = memopt.create(model, spec, lr=RATE)
    for step in range(2):
        model.give(step)
        opt.step()
    saved = opt.state_dict()
    opt = memopt.create(model, spec, lr=RATE)
    opt.load_state_dict(saved)
    model.give(2)
    opt.step()
    size = opt.partition.world_size
    same = opt.ledger() == memopt.price(model, spec, rank=opt.partition.rank, world_size=size)
    return {"model": model.state_dict(), "same_price": same}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_step_as_one_process(world):
    alone = run("scale/zero1")
    for rank in ranks.run(run, world, "scale/zero1"):
        assert rank["same_price"]
        for name, p in alone["model"].items():
            assert_same_bits(rank["model"][name], p, name)


def test_from_another_rule_and_back():
    model = Model()
    opt = memopt.create(model, "adamw", lr=1e-3)
    model.give(0)
    opt.step()
    opt.convert_("scale")
    assert opt.state[model.up.weight].keys() == {"step"}
    assert opt.state[model.lm_head.weight].keys() == {"step", "exp_avg"}
    assert opt.state[model.norm.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    model.give(1)
    opt.step()
    opt.convert_("adamw", fill={"exp_avg": 0, "exp_avg_sq": 0})
    assert opt.state[model.up.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    model.give(2)
    opt.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: memopt.parse("scale", hyper={"momentum": 0.9}), "scale has no hyperparameter 'momentum'"),
        (lambda: memopt.parse("scale", rules={"scale_head": {"momentum": 1.0}}), "momentum must be a number in"),
        (lambda: memopt.parse("scale_head"), "cannot read the spec 'scale_head'.*RULE is one of .*scale, apollo"),
        (lambda: memopt.parse("scale-factored"), "no moment of scale has a factored form"),
        (lambda: memopt.parse("lookahead(scale)"), "does not take every parameter"),
        (lambda: memopt.price({"w": (64, 64)}, "scale", deepspeed=2), "sums columns of matrices"),
        (
            lambda: memopt.create([nn.Parameter(torch.zeros(8))], "scale"),
            "no parameter is a hidden matrix.*use 'adamw'",
        ),
    ],
)
def test_what_means_nothing_is_one_sentence(make, words):
    with pytest.raises(SpecError, match=words):
        make()
