"""Schedules are their closed form at every step, survive a resume, and are torch's twin where there is one."""

import json
from math import cos, pi, sqrt

import pytest
import torch
from torch import nn

import memopt
from memopt.cli import main
from memopt.core.hyperparameters import SpecError

PEAK, T, W, FLOOR = 0.3, 50, 7, 0.1

#: kind, keywords, the rate at step t written down separately
FORMS = [
    ("constant", {}, lambda t: 1.0),
    ("linear", {}, lambda t: FLOOR + 0.9 * (1 - (t - W) / (T - W))),
    ("cosine", {}, lambda t: FLOOR + 0.9 * 0.5 * (1 + cos(pi * (t - W) / (T - W)))),
    ("cosine_restarts", {"cycle": 10}, lambda t: FLOOR + 0.9 * 0.5 * (1 + cos(pi * ((t - W) % 10) / 10))),
    ("inverse_sqrt", {}, lambda t: max(FLOOR, sqrt(W / t))),
    ("inverse_sqrt", {"hold": 9}, lambda t: max(FLOOR, min(1.0, 3 / sqrt(t - W + 1)))),
    ("step", {"every": 9, "gamma": 0.5}, lambda t: max(FLOOR, 0.5 ** ((t - W) // 9))),
    ("wsd", {"decay": 0.2}, lambda t: 1.0 if t <= 40 else FLOOR + 0.9 * (50 - t) / 10),
]


def rates(scheduler, opt, steps):
    seen = []
    for _ in range(steps):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return seen


def optimizer(lr=PEAK):
    return memopt.create(nn.Linear(2, 2), "adamw", lr=lr)


@pytest.mark.parametrize(("kind", "extra", "form"), FORMS, ids=[f"{f[0]} {f[1]}" for f in FORMS])
def test_closed_form_at_every_step_and_through_a_resume(kind, extra, form):
    opt = optimizer()
    scheduler = memopt.schedule(opt, kind, warmup=W, total_steps=T, floor=FLOOR, **extra)
    expected = [PEAK * ((t + 1) / (W + 1) if t < W else form(t)) for t in range(T)]
    first = rates(scheduler, opt, 20)
    saved = scheduler.state_dict(), opt.state_dict()
    opt = optimizer()
    scheduler = memopt.schedule(opt, kind, warmup=W, total_steps=T, floor=FLOOR, **extra)
    opt.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[0])
    assert first + rates(scheduler, opt, T - 20) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "extra", "twin"),
    [
        ("cosine", {"floor": FLOOR}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T, eta_min=FLOOR * PEAK)),
        ("linear", {"floor": FLOOR}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, FLOOR, T)),
        ("step", {"every": 9}, lambda o: torch.optim.lr_scheduler.StepLR(o, 9)),
        ("constant", {}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (
            "cosine_restarts",
            {"cycle": 6, "cycle_mult": 2},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 6, 2),
        ),
    ],
)
def test_torchs_twin(kind, extra, twin):
    ours, theirs = optimizer(), optimizer()
    mine = rates(memopt.schedule(ours, kind, total_steps=T, **extra), ours, T)
    assert mine == pytest.approx(rates(twin(theirs), theirs, T), rel=1e-9)


def test_warmup_as_a_share_and_groups_of_their_own():
    model = nn.Linear(2, 2)
    opt = memopt.create([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}], "adamw")
    scheduler = memopt.schedule(opt, "linear", warmup=0.1, total_steps=100)
    for _ in range(10):
        opt.step()
        scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("kind", "keywords", "words"),
    [
        ("cosin", {}, "unknown schedule 'cosin'; allowed: constant, linear, cosine"),
        ("cosine", {}, "needs total_steps"),
        ("constant", {"warmup": 0.1}, "needs total_steps"),
        ("cosine", {"total_steps": 10, "warmup": 11}, "warmup=11 is longer than total_steps=10"),
        ("cosine", {"total_steps": 0}, "total_steps=0"),
        ("cosine", {"total_steps": 10, "floor": 1.5}, "floor=1.5 .* share of the peak"),
        ("cosine", {"total_steps": 10, "floor": float("nan")}, "floor=nan"),
        ("cosine", {"total_steps": 10, "warmup": 1.5}, "warmup=1.5"),
        ("cosine", {"total_steps": 10, "warmup": -1}, "warmup=-1"),
        ("cosine", {"total_steps": 10, "gamma": 0.5}, "has no 'gamma'; it has no extra keywords"),
        ("step", {}, "every=None .* integer >= 1"),
        ("wsd", {"total_steps": 10, "decay": 0}, "decay=0"),
        ("inverse_sqrt", {"hold": 3, "timescale": 4}, "give one of them"),
    ],
)
def test_bad_input(kind, keywords, words):
    with pytest.raises(SpecError, match=words):
        memopt.schedule(optimizer(), kind, **keywords)


def test_a_rule_with_its_own_rate_is_refused():
    opt = memopt.create(nn.Linear(2, 2), "adafactor", convention="transformers")
    with pytest.raises(SpecError, match="makes its own rate"):
        memopt.schedule(opt, "constant")


def test_the_warm_up_is_torchs_linear_one():
    ours, theirs = optimizer(), optimizer()
    mine = rates(memopt.schedule(ours, "constant", warmup=W), ours, T)
    twin = torch.optim.lr_scheduler.LinearLR(theirs, 1 / (W + 1), 1.0, W)
    assert mine == pytest.approx(rates(twin, theirs, T), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "extra", "twin"),
    [
        ("linear", {}, lambda t, o: t.get_linear_schedule_with_warmup(o, 0, T)),
        ("cosine", {}, lambda t, o: t.get_cosine_schedule_with_warmup(o, 0, T)),
        ("inverse_sqrt", {"timescale": 5}, lambda t, o: t.get_inverse_sqrt_schedule(o, 0, timescale=5)),
        (
            "wsd",
            {"decay": 0.2, "floor": FLOOR},
            lambda t, o: t.get_wsd_schedule(o, 0, 10, num_stable_steps=40, min_lr_ratio=FLOOR, decay_type="linear"),
        ),
    ],
)
def test_transformers_twin(kind, extra, twin):
    transformers = pytest.importorskip("transformers.optimization")
    ours, theirs = optimizer(), optimizer()
    mine = rates(memopt.schedule(ours, kind, total_steps=T, **extra), ours, T)
    assert mine == pytest.approx(rates(twin(transformers, theirs), theirs, T), rel=1e-9)


def test_decay_goes_with_the_rate_and_through_a_resume():
    def start():
        model = nn.Linear(2, 2)
        opt = memopt.create(memopt.param_groups(model, 0.01), "adamw", lr=PEAK)
        return opt, memopt.schedule(opt, "linear", warmup=W, total_steps=T, decay_with_rate=True)

    def check(opt):
        decays = [g["weight_decay"] for g in opt.param_groups]
        assert decays == pytest.approx([0.01 * opt.param_groups[0]["lr"] / PEAK, 0.0], rel=1e-12)

    opt, scheduler = start()
    for _ in range(20):
        check(opt)
        opt.step()
        scheduler.step()
    saved = opt.state_dict(), scheduler.state_dict()
    opt, scheduler = start()
    opt.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for _ in range(20, T):
        check(opt)
        opt.step()
        scheduler.step()


def test_the_command_prints_plots_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rate.png"
    argv = ["schedule", "cosine", "--total-steps", "50", "--warmup", "7", "--floor", "0.1", "--lr", "0.3"]
    assert main([*argv, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    said, *described = out.splitlines()
    assert said == f"written: {picture}"
    text = "cosine over 50 steps: 7 steps of warm-up, then falls in half a cosine to the floor, floor 0.1"
    assert " ".join(" ".join(described).split()).startswith(text)
    assert "7: 0.3" in out
    assert any(0x2800 < ord(c) < 0x2900 for c in out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    expected = [PEAK * ((t + 1) / (W + 1) if t < W else FORMS[2][2](t)) for t in range(T)]
    assert written["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cosin", "--total-steps", "9"], "unknown schedule 'cosin'"),
        (["cosine", "--total-steps", "9", "--warmup", "10"], "warmup=10 is longer than total_steps=9"),
        (["cosine", "--total-steps", "9", "--floor", "2"], "floor=2.0 is not allowed; it is a share of the peak"),
        (["cosine", "--total-steps", "9", "--warmup", "few"], "--warmup 'few'"),
        (["cosine", "--total-steps", "9", "--gamma", "0.5"], "has no 'gamma'"),
        (["cosine", "--total-steps", "9", "--plot", "rate.txt"], "'rate.txt' is not a picture"),
    ],
)
def test_the_command_refuses(argv, words, capsys):
    if "--plot" in argv:
        pytest.importorskip("matplotlib")
    assert main(["schedule", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
