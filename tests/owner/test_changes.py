"""docs/changes.md: what people do to an optimizer in mid-training, a row each, over specs of all axes.

Rows are operations of tests/twin, where memopt's optimizer and torch.optim's go through the same; what they have not is
below, against torch.optim directly.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt
from memopt.kernels import loader
from tests.twin.sequences import replay

PAGE = Path(__file__).parents[2] / "docs" / "changes.md"
#: Row -> the operations of the twin that it is.
ROWS = {
    "params removed": "remove_parameter/1",
    "params reordered": "reorder/3",
    "a parameter swapped": "swap_parameter/5",
    "a parameter comes back": "remove_parameter/2 step/4 come_back/1",
    "a group removed": "remove_group/3",
    "an empty group": "empty_group/1",
    "a moment reset by hand": "reset_by_hand/7",
    "a moment of another size": "wrong_moment/2",
    "state deleted": "forget_state/9",
    "keys of one's own": "own_keys/4",
    "the step count": "step_count/3",
    "weights replaced": "weights_changed/5",
    "weights grown": "grown/6",
    "weights in other strides": "strided/2",
    "model.to(dtype)": "cast/8",
    "frozen and unfrozen": "freeze/1 step/2 freeze/1",
    "a switch": "switch/5",
    "a switch there and back": "switch/5 step/3 switch/5",
    "hooks of state_dict": "state_dict_hooks/2",
    "no gradients": "missing_gradients/3 no_gradient/4",
}
SPECS = [
    "adamw-32bit@device",
    "adam-8bit@host",
    "sgd-32bit@cpu",
    "adamw-bf16@disk/zero1",
    "rmsprop-4bit@paged",
    "adamw-fp8+kahan@device/zero1",
]


#: Every row over two specs, over all of them in the slow part.
SOME = [pytest.param(row, range(i % 3, len(SPECS), 3), id=row) for i, row in enumerate(ROWS)]
ALL = [pytest.param(row, range(len(SPECS)), id=f"{row}, all", marks=pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize(("row", "specs"), [*SOME, *ALL])
def test_rows_of_the_table(row, specs):
    """With kernels; and on the reference path."""
    for i in specs:
        replay(f"{100 + i}={SPECS[i]}: step/1 {ROWS[row]} step/2 state_dict/1 step/3 save/1")


@pytest.mark.parametrize("row", ROWS)
def test_rows_on_the_reference_path(row, monkeypatch):
    monkeypatch.setattr(loader, "_loaded", loader.Missing("a test of the reference path"))
    i = list(ROWS).index(row) % 2
    replay(f"{200 + i}={SPECS[i]}: step/1 {ROWS[row]} step/2")


def test_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_sgd_momentum_later_and_off_and_on_is_torchs(dampening):
    made = [
        lambda q: torch.optim.SGD(q, lr=0.1, dampening=dampening),
        lambda q: memopt.create(q, "sgd", lr=0.1, dampening=dampening),
    ]
    ends = []
    for make in made:
        p = nn.Parameter(torch.zeros(70, 70))
        opt = make([p])
        g = torch.Generator().manual_seed(0)
        for momentum in (0.0, 0.9, 0.9, 0.0, 0.9):
            opt.param_groups[0]["momentum"] = momentum
            p.grad = torch.randn(70, 70, generator=g)
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit@disk", "sgd-4bit@host", "adamw-fp8/zero1"])
def test_what_is_ones_own_travels(spec, tmp_path):
    def made():
        torch.manual_seed(0)
        model = nn.Linear(80, 64)
        return model, memopt.create(model, spec, **({"momentum": 0.9} if spec.startswith("sgd") else {}))

    model, opt = made()
    model(torch.ones(2, 80)).sum().backward()
    opt.step()
    opt.state[model.weight].update(count=3, mine=torch.arange(100.0))
    opt.state["tokens_seen"] = 12345
    opt.step()
    opt.convert_(f"{spec.split('-')[0].split('/')[0]}-bf16")
    opt.convert_(spec)
    other, twin = made()
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    third, loaded = made()
    memopt.save(tmp_path, model=model, optimizer=opt)
    memopt.load(tmp_path, model=third, optimizer=loaded)
    copied_model, copied = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (other, twin), (third, loaded), (copied_model, copied)):
        assert o.state[m.weight]["count"] == 3
        assert torch.equal(o.state[m.weight]["mine"], torch.arange(100.0))
        assert o.state["tokens_seen"] == 12345


def test_a_checkpoint_that_could_not_be_loaded_is_not_written(tmp_path):
    embedding = nn.Embedding(500, 256)
    opt = memopt.create(embedding, "adamw-8bit")
    embedding(torch.arange(9)).sum().backward()
    opt.step()
    first = memopt.save(tmp_path, model=embedding, optimizer=opt, keep=1).path
    embedding.weight.data = torch.cat([embedding.weight.data, torch.zeros(100, 256)])
    embedding.weight.grad = None
    for refused in (
        lambda: memopt.save(tmp_path, model=embedding, optimizer=opt, keep=1),
        opt.state_dict,
        lambda: opt.convert_("adamw-4bit"),
    ):
        with pytest.raises(RuntimeError, match=r"weight is float32 \[600, 256\] here"):
            refused()
    assert first.is_dir()
    model = nn.Embedding(500, 256)
    memopt.load(tmp_path, model=model, optimizer=memopt.create(model, "adamw"))


def test_parameters_of_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 3))
    opt = memopt.create(model, "adamw-8bit@cpu")
    opt.step()
    assert "adamw-8bit" in opt.explain()
    model(torch.ones(2, 80)).sum().backward()
    opt.step()
    assert opt.state[model[0].weight]["exp_avg.codes"].shape == (64, 80)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_of_any_dtype(dtype, tmp_path):
    model = nn.Linear(80, 64)
    model.base = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    opt = memopt.create(model, "adamw-8bit@cpu")
    model(torch.ones(2, 80)).sum().backward()
    opt.step()
    assert set(opt.state) == {model.weight, model.bias}
    assert opt.ledger().nbytes == memopt.price(model, "adamw-8bit@cpu").nbytes
    assert "adamw-8bit" in opt.explain()
    copy.deepcopy(opt)
    opt.convert_("adamw")


def test_wrapped_names():
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    for wrapped in (torch.compile(made, backend="eager"), nn.DataParallel(made)):
        opt = memopt.create(wrapped, "adamw", overrides={"0.*": "8bit"})
        assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    real = nn.Module()
    real.module, real.head = nn.Linear(64, 64), nn.Linear(64, 8)
    opt = memopt.create(real, "adamw", overrides={"module.*": "8bit"})
    assert opt.spec.for_parameter("head.weight")[0] == "32bit"
    assert opt.param_groups[0]["param_names"][0] == "module.weight"


@pytest.mark.parametrize("spec", ["adamw", "sgd", "adamw-8bit@disk", "adafactor"])
def test_a_stale_graph_is_refused(spec):
    w = nn.Parameter(torch.randn(64, 64))
    opt = memopt.create([w], spec, lr=0.1)
    for _ in range(3):  # without a plan and with one
        x = torch.randn(8, 64)
        loss = ((x @ w) @ w).sum()
        w.grad = torch.randn(64, 64)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_vector_in_the_place_of_all_that_was_there_is_no_flat_vector_of_deepspeeds():
    """DeepSpeed keeps the parameters that it steps for; these are gone."""
    opt = memopt.create([torch.nn.Parameter(torch.ones(64, 64))], "stableadamw")
    opt.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(33))]
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    opt.step()
    assert float(p.detach().max()) < 1
