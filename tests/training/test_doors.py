"""The calls with which training programs make the optimizer that their configuration names; the diffs of the docs."""

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt

ROOT = Path(__file__).parents[2]
LR, STEPS = 1e-2, 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(67, 67), nn.ReLU(), nn.Linear(67, 67))


def losses(model, opt, first=0):
    """Of a loop; without an optimizer parameters step in ``backward()``."""
    found = []
    for step in range(first, STEPS):
        loss = model(torch.randn(8, 67, generator=torch.Generator().manual_seed(step))).square().mean()
        loss.backward()
        if opt is not None:
            opt.step()
            opt.zero_grad()
        found.append(loss.item())
    return found


def expected(spec="adamw-8bit"):
    model = net()
    return losses(model, memopt.create(model, spec, lr=LR))


def by_dotted_path(arguments, model):
    """kohya: ``--optimizer_type memopt.Optimizer --optimizer_args "spec='adamw-8bit'"``."""
    module, _, name = "memopt.Optimizer".rpartition(".")
    keywords = {key: ast.literal_eval(value) for key, value in (one.split("=") for one in arguments)}
    return getattr(importlib.import_module(module), name)(list(model.parameters()), lr=LR, **keywords)


CALLS = {
    "kohya": lambda model: by_dotted_path(["spec='adamw-8bit'", "weight_decay=0.01"], model),
    "NeMo": lambda model: memopt.Optimizer(params=list(model.parameters()), spec="adamw-8bit", lr=LR),
    "torchtune": lambda model: memopt.Optimizer(model.parameters(), spec="adamw-8bit", lr=LR),
    "diffusers": lambda model: functools.partial(memopt.create, spec="adamw-8bit")(
        list(model.parameters()), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    ),
    "torchtitan": lambda model: functools.partial(memopt.Optimizer, spec="adamw-8bit")(
        [
            {
                "params": list(model.parameters()),
                "param_names": [name for name, _ in model.named_parameters()],
                "fused": False,
                "foreach": False,
                "lr": LR,
            }
        ]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_losses_are_those_of_a_loop_of_ones_own(call):
    model = net()
    assert losses(model, CALLS[call](model)) == expected()


def test_torchtunes_optimizer_in_backward_makes_one_for_each_parameter():
    model = net()
    optimizers = {p: memopt.Optimizer([p], "adamw", lr=LR) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    assert losses(model, None) == expected("adamw")


@pytest.mark.slow
def test_lightning_fabric_trains_saves_and_loads(tmp_path):
    fabrics = pytest.importorskip("lightning.fabric")
    fabric = fabrics.Fabric(accelerator="cpu", devices=1)
    model = net()
    model, opt = fabric.setup(model, memopt.create(model, "adamw-8bit", lr=LR))
    file = tmp_path / "state.ckpt"
    whole = expected()
    for step in range(STEPS):
        if step == 2:
            fabric.save(file, {"model": model, "optimizer": opt})
        loss = model(torch.randn(8, 67, generator=torch.Generator().manual_seed(step))).square().mean()
        fabric.backward(loss)
        opt.step()
        opt.zero_grad()
        assert loss.item() == whole[step]
    again = net()
    again, other = fabric.setup(again, memopt.create(again, "adamw-8bit", lr=LR))
    fabric.load(file, {"model": again, "optimizer": other})
    assert losses(again, other, 2) == whole[2:]


def test_trainer_does_not_begin_with_another_optimizer():
    """As its DeepSpeed file's "optimizer" section makes it, without a word and without asking ours."""
    pytest.importorskip("transformers")
    from memopt.integrations.transformers import consolidate_callback

    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model, callback = net(), consolidate_callback()
    callback.on_train_begin(None, None, None, optimizer=Wrapped(Wrapped(memopt.create(model, "adamw"))))
    with pytest.raises(RuntimeError, match=r'steps AdamW and no memopt.*"optimizer" section.*zero_force_ds_cpu'):
        callback.on_train_begin(None, None, None, optimizer=Wrapped(torch.optim.AdamW(model.parameters())))


def test_the_diffs_of_the_docs_are_the_lines_that_the_benchmark_changes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scripts = importlib.import_module("scripts")
    assert scripts.diffs().strip() in (ROOT / "docs" / "frameworks.md").read_text()
    for name in ("scripts", "scripts_table", "provenance"):
        sys.modules.pop(name, None)
