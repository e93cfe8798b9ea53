"""Published recipes: every one builds, trains, can be changed, and says where its figures stand."""

from math import sqrt

import pytest
import torch
from torch import nn

import memopt
from memopt.cli import main
from memopt.core.hyperparameters import SpecError
from memopt.recipes import PUBLISHED


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 64)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2))
        self.head = nn.Linear(64, 20, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x), (tokens * 7 + 3) % 20)


def train(training, model, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = model(torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(step)))
        loss.backward()
        training.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_builds_and_trains(name):
    model = Net()
    published = memopt.recipe(name)
    assert published.source
    steps = 20
    training = published.build(model, total_steps=steps)
    assert sum(p.numel() for g in training.optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(training, model, steps)
    assert all(x < float("inf") for x in losses)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert str(training.optimizer.spec) == published.spec


def test_a_recipe_is_the_optimizer_the_groups_the_schedule_and_the_clipping_it_says():
    """Llama 2 7B in 500 steps, against the same written out in torch."""
    ours, theirs = Net(), Net()
    training = memopt.recipe("llama-2-7b").build(ours, total_steps=500)
    decayed = {"layers.0.0.weight", "layers.1.0.weight", "head.weight"}
    named = list(theirs.named_parameters())
    opt = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ],
        lr=3e-4,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    factor = lambda t: (t + 1) / 3 if t < 2 else 0.1 + 0.45 * (1 + torch.tensor((t - 2) / 498 * torch.pi).cos().item())  # noqa: E731
    rates = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    for step in range(10):
        for model in (ours, theirs):
            (50 * model(torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(step)))).backward()
        norm = training.step()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item(), rel=1e-4)
        assert norm > 1
        opt.step()
        rates.step()
        opt.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_palm_is_unfactored_with_its_rate_its_beta2_and_its_decay():
    model = Net()
    training = memopt.recipe("palm-540b", hold=4).build(model, total_steps=50)
    assert not any(line.part for line in memopt.price(model, training.optimizer.spec, **training.recipe.hyper))
    reference = {n: [p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for n, p in model.named_parameters()}
    decayed = {"layers.0.0.weight", "layers.1.0.weight", "head.weight"}
    for k in range(1, 11):
        lr = min(1e-2, 1e-2 * sqrt(4 / k))
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        model(torch.arange(20)).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for name, p in model.named_parameters():
            w, v, m = reference[name]
            g = p.grad / max(1.0, norm.item())
            rms = max(1e-3, w.square().mean().sqrt().item())
            if name in decayed:
                w.mul_(1 - lr**2)
            v.copy_((1 - k**-0.8) * v + k**-0.8 * g**2)
            u = g / v.clamp(min=2.0**-46).sqrt()
            u = u / max(1.0, u.square().mean().sqrt().item())
            m.copy_(0.9 * m + 0.1 * rms * lr * u)
            w.sub_(m)
        training.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), reference[name][0], rtol=1e-4, atol=1e-6, msg=f"{name} at {k}")


def test_everything_can_be_overridden():
    model = Net()
    training = memopt.recipe("gpt-3-175b", lr=1e-3).build(
        model,
        spec="adamw-8bit@paged",
        total_steps=200,
        warmup=0.1,
        floor=0.5,
        kind="linear",
        clip_norm=None,
        weight_decay=0.3,
        betas=(0.8, 0.9),
        rates={"head.*": 1e-2},
        overrides={"embed.*": "32bit"},
    )
    opt = training.optimizer
    assert str(opt.spec) == "adamw-8bit@paged"
    assert {g["initial_lr"] for g in opt.param_groups} == {1e-3, 1e-2}
    assert {g["weight_decay"] for g in opt.param_groups} == {0.3, 0.0}
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)
    assert training.clip() is None
    assert (training.recipe.kind, training.recipe.warmup, training.recipe.floor) == ("linear", 0.1, 0.5)
    assert train(training, model, 3)


def test_other_steps_keep_the_shape():
    assert memopt.recipe("llama-2-7b", total_steps=1000).warmup == 4
    assert memopt.recipe("llama-2-7b", total_steps=1000, warmup=100).warmup == 100
    assert memopt.recipe("llama-2-7b", warmup=100).override(total_steps=1000).warmup == 100
    assert memopt.recipe("t5", total_steps=5243).schedule["hold"] == 100
    assert memopt.recipe("bert-finetune", total_steps=50).warmup == 0.1
    with pytest.raises(Exception, match="cannot assign"):
        memopt.recipe("t5").lr = 1.0


def test_berts_embeddings_decay_and_its_norms_do_not():
    training = memopt.recipe("bert-finetune").build(Net(), total_steps=10)
    where = {n: g["weight_decay"] for g in training.optimizer.param_groups for n in g["param_names"]}
    assert where["embed.weight"] == 0.01
    assert where["layers.0.1.weight"] == where["layers.0.0.bias"] == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: memopt.recipe("llama-2-7"), r"unknown recipe 'llama-2-7'; did you mean llama-2-7b"),
        (lambda: memopt.recipe("???"), r"unknown recipe '\?\?\?'; there are gpt-3-175b"),
        (lambda: memopt.recipe("bert-finetune").build(Net()), "'bert-finetune' depends on the length of the run"),
        (lambda: memopt.recipe("t5", kind="cosin"), "unknown schedule 'cosin'"),
        (lambda: memopt.recipe("qlora").build(Net(), colour=1), "adamw has no hyperparameter 'colour'"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), spec="lion"), "lion has no hyperparameter 'eps'"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), total_steps=10, warmup=11), "longer than total_steps=10"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), clip_norm=-1.0), "clip_norm=-1.0"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), decays="none"), "decays='none'"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), rates={"hed.*": 1.0}), r"'hed.\*' matches no parameter"),
        (lambda: memopt.recipe("llama-2-7b").build(Net(), floor=2.0), "floor=2.0"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(SpecError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_command_lists_and_shows(capsys):
    assert main(["list", "recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PUBLISHED)
    assert main(["list", "recipes", "palm-540b"]) == 0
    out = capsys.readouterr().out
    assert "adafactor-32bit, lr=0.01" in out
    assert "Chowdhery et al. 2022" in out
    assert main(["list", "recipes", "palm"]) == 2
    assert "did you mean palm-540b" in capsys.readouterr().err
    assert main(["list", "specs", "palm"]) == 2
    assert main(["list", "recipes", "t5", "--json"]) == 0
