"""``memopt.watch``: what it measures is so; in runs broken on purpose it names the cause, in whole ones none."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.text import Corpus, load_text

CONFIG = ModelConfig(context=32, width=48, layers=2, heads=3)
RATE, STEPS = 3e-3, 60


@pytest.fixture(scope="module")
def corpus():
    torch.set_num_threads(1)
    return Corpus(load_text(), CONFIG.context)


def language_model(dtype=torch.float32):
    torch.manual_seed(0)
    return LanguageModel(CONFIG).to(dtype)


def run(corpus, model, opt, steps=STEPS, warmup=0.1, damage=lambda step, loss: loss, schedule="cosine"):
    """A small language model on real text, watched every 20 steps."""
    rates = memopt.schedule(opt, schedule, warmup=warmup, total_steps=steps)
    with memopt.watch(opt, every=20, out=None) as watch:
        for step in range(1, steps + 1):
            opt.zero_grad()
            loss = damage(step, model(corpus.batch(0, step, 8)))
            loss.backward()
            watch.loss(loss)
            memopt.clip_grad_norm_(opt, 1.0)
            opt.step()
            rates.step()
    return watch


def causes(watch):
    return [finding.cause for finding in watch.findings()]


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit", "adamw-4bit", "adafactor", "lion", "muon"])
def test_in_a_run_that_is_whole_it_names_nothing(corpus, spec):
    model = language_model()
    watch = run(corpus, model, memopt.create(model, spec, lr=RATE / 5 if spec == "lion" else RATE))
    assert causes(watch) == []
    assert watch.history.losses[-1][1] < 0.9 * watch.history.losses[0][1]


def test_a_rate_a_thousand_times_too_high(corpus):
    model = language_model()
    watch = run(corpus, model, memopt.create(model, "adamw", lr=1000 * RATE))
    assert causes(watch) == ["rate"]
    sentence = watch.findings()[0].sentence
    assert "of 3," in sentence
    assert "by a factor of about 1,000" in sentence


@pytest.mark.parametrize(
    ("hyper", "cause", "words"),
    [
        ({"lr": 0.02}, "rate of muon", "has lr=0.02 under adjust_lr_fn='match_rms_adamw'"),
        ({"lr": 0.05, "adjust_lr_fn": "original"}, "rate of muon's fallback", "has Muon's rate 0.05"),
        ({"lr": 2e-4, "adjust_lr_fn": "original"}, "rate of muon", "has AdamW's rate 0.0002 under"),
        ({"lr": 0.02, "adjust_lr_fn": "original", "rules": {"adamw": {"lr": 2e-3}}}, None, ""),
    ],
)
def test_rates_of_muon(corpus, hyper, cause, words):
    model = language_model()
    watch = run(corpus, model, memopt.create(model, "muon", **hyper), steps=20, warmup=0, schedule="constant")
    found = watch.findings()
    assert [f.cause for f in found] == ([cause] if cause else [])
    assert words in "".join(f.sentence for f in found)


@pytest.fixture(scope="module")
def pretrained(corpus):
    model = language_model()
    run(corpus, model, memopt.create(model, "adamw", lr=RATE), steps=250)
    return model.state_dict()


def finetuned(corpus, pretrained, warmup):
    model = language_model()
    model.load_state_dict(pretrained)
    return run(corpus, model, memopt.create(model, "adamw", lr=2e-2), warmup=warmup, schedule="linear")


def test_no_warm_up(corpus, pretrained):
    """Fine-tuning at a rate that the same run with a warm-up bears."""
    without, with_ = finetuned(corpus, pretrained, 0.0), finetuned(corpus, pretrained, 0.3)
    assert causes(without) == ["warm-up"]
    assert "the first step has the full rate 0.02" in without.findings()[0].sentence
    assert "warm-up" not in causes(with_)
    ends = [sum(x for _, x in w.history.losses[-10:]) / 10 for w in (without, with_)]
    assert ends[0] > 1.1 * ends[1], "the run is not broken"


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit"])
def test_bf16_weights_without_a_master(corpus, spec):
    model = language_model(torch.bfloat16)
    watch = run(corpus, model, memopt.create(model, spec, lr=1e-5))
    assert causes(watch) == ["rounding"]
    assert "rounded away" in watch.findings()[0].sentence
    assert "+kahan" in watch.findings()[0].sentence
    assert watch.readings[-2].groups[0].lost > 0.5


@pytest.mark.parametrize("spec", ["adamw+kahan", "adamw-8bit+stochastic", "adamw+split", "adamw+fp32"])
def test_bf16_weights_with_a_master(corpus, spec):
    model = language_model(torch.bfloat16)
    assert causes(run(corpus, model, memopt.create(model, spec, lr=1e-4))) == []


def shifted(opt, weight, steps=1600):
    """Gradients of three quarters of each row that become a hundredth after 100 steps."""
    g = torch.Generator().manual_seed(0)
    drops = torch.rand(weight.shape, generator=g) < 0.75
    with memopt.watch(opt, every=200, out=None) as watch:
        for step in range(steps):
            noise = torch.randn(weight.shape, generator=g)
            weight.grad = torch.where(drops & (step >= 100), noise / 100, noise).to(weight.dtype)
            opt.step()
    return watch


def test_a_second_moment_that_is_frozen():
    """torch.optim keeps the state of bf16 weights in bf16, where b2 = 0.999 rounds to nothing."""
    weight = nn.Parameter(torch.randn(32, 256).bfloat16())
    watch = shifted(torch.optim.AdamW([("head.weight", weight)], lr=1e-2), weight)
    assert causes(watch)[0] == "frozen second moment"
    sentence = watch.findings()[0].sentence
    assert "exp_avg_sq of head.weight" in sentence
    assert "at b2=0.999" in sentence
    assert "bfloat16 rounds that away" in sentence


def test_a_second_moment_that_is_frozen_in_bitsandbytes_8_bits():
    pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.randn(32, 256))
    watch = shifted(memopt.create([("head.weight", weight)], "adamw-8bit", engine="bitsandbytes"), weight)
    assert causes(watch)[0] == "frozen second moment"
    assert "dynamic8 rounds that away" in watch.findings()[0].sentence


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit", "adamw-bf16"])
def test_our_second_moments_are_not(spec):
    weight = nn.Parameter(torch.randn(32, 256))
    watch = shifted(memopt.create([("head.weight", weight)], spec), weight)
    assert causes(watch) == []
    (second,) = [m for m in watch.readings[-1].moments if m.moment == "exp_avg_sq"]
    assert second.ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_batch_that_gives_nan(corpus, nonfinite):
    model = language_model()
    opt = memopt.create(model, "adamw", lr=RATE, nonfinite=nonfinite)
    with pytest.warns(UserWarning, match="was skipped") if nonfinite == "skip" else nullcontext():
        watch = run(corpus, model, opt, damage=lambda step, loss: loss * float("nan") if step == 34 else loss)
    assert causes(watch) == ["non-finite batch"]
    finding = watch.findings()[0]
    assert finding.step == 34
    assert "at step 34" in finding.sentence
    assert ("positions, embedding.weight" in finding.sentence) == (nonfinite == "skip")
    assert ("nothing was changed" in finding.sentence) == (nonfinite == "skip")


def test_a_rate_for_the_wrong_group(corpus):
    model = language_model()
    groups = memopt.param_groups(model, 0.1, rates={"blocks.0.*": 0.3})
    watch = run(corpus, model, memopt.create(groups, "adamw", lr=RATE))
    assert causes(watch) == ["rate of a group"]
    assert "(blocks.0." in watch.findings()[0].sentence
    assert "100 times that of others" in watch.findings()[0].sentence


def test_a_model_that_is_being_destroyed(corpus, pretrained):
    model = language_model()
    model.load_state_dict(pretrained)
    flip = lambda step, loss: -loss if 5 < step < 30 else loss  # noqa: E731
    opt = memopt.create(model, "adamw", lr=1e-3)
    with memopt.watch(opt, every=20, out=None) as watch:
        for step in range(STEPS):
            opt.zero_grad()
            loss = model(corpus.batch(0, step, 8))
            watch.loss(loss)
            flip(step, loss).backward()
            opt.step()
    assert causes(watch) == ["worse than it began"]
    assert "rate ten times lower" in watch.findings()[0].sentence


def test_a_loss_that_does_not_move(corpus):
    model = language_model()
    watch = run(corpus, model, memopt.create(model, "adamw", lr=1e-9), steps=100)
    assert causes(watch) == ["flat"]
    assert "the rate is too low" in watch.findings()[0].sentence


def test_lines_are_printed_and_written(tmp_path, corpus):
    said: list[str] = []
    model = language_model()
    opt = memopt.create(memopt.param_groups(model, 0.1, rates={"blocks.0.*": 0.3}), "adamw-8bit", lr=RATE)
    watch = memopt.watch(opt, every=4, log=tmp_path / "watch.jsonl", out=said.append)
    for step in range(8):
        opt.zero_grad()
        loss = model(corpus.batch(0, step, 2))
        loss.backward()
        watch.loss(loss)
        opt.step()
    watch.close()
    opt.step()  # nobody looks any more
    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 8]
    assert lines[0]["groups"][0].keys() >= {"lr", "grad_norm", "update_ratio", "lost", "nonfinite"}
    assert lines[-1]["moments"][0].keys() == {"parameter", "moment", "format", "error", "ratio"}
    assert [s["cause"] for line in lines for s in line["says"]] == ["rate of a group"]
    assert len([s for s in said if s.startswith("step ")]) == 4
    assert sum(s.startswith("  rate of a group: ") for s in said) == 1
    assert "rate of a group: " in watch.report()
    assert watch.step == 8


@pytest.mark.parametrize("now", [True, False])
def test_a_moment_that_only_some_parameters_have(now):
    """Switched on, or off again, while the others had no gradient; the watch begins behind that."""
    params = [*map(nn.Parameter, torch.randn(3, 64, 64))]
    opt = memopt.create([(f"w{i}", p) for i, p in enumerate(params)], "adamw-8bit", amsgrad=not now)

    def step(some):
        for p in params:
            p.grad = torch.randn_like(p) if any(p is q for q in some) else None
        opt.step()

    step(params[:1] if not now else params)
    opt.param_groups[0]["amsgrad"] = now
    step(params[1:])
    with memopt.watch(opt, every=1, out=None) as watch:
        for _ in range(3):
            step(params)
        assert watch.step == 3
    assert not watch.findings()
