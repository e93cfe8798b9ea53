"""``memopt convert`` in the place of a file that a training script wrote: Trainer, accelerate, Lightning, nanoGPT."""

import copy
import math
from collections import OrderedDict

import pytest
import torch

import memopt
from tests.helpers.tools import LR, drive, model

#: File name -> where the optimizer's dictionary is in it.
FILES = {"optimizer.pt": (), "optimizer.bin": (), "step=3.ckpt": ("optimizer_states", 0), "ckpt.pt": ("optimizer",)}


def content(name, net, opt):
    """What Trainer and accelerate, Lightning and nanoGPT hand to torch.save."""
    if not FILES[name]:
        return opt.state_dict()
    if name == "ckpt.pt":
        best = torch.tensor(math.pi)
        return {"model": net.state_dict(), "optimizer": opt.state_dict(), "iter_num": 3, "best_val_loss": best}
    return {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": net.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "kth_value": torch.tensor(1.0)}},
        "optimizer_states": [opt.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": LR, "betas": (0.9, 0.95)},
    }


#: Which of torch's optimizers, where the file does not say it: torch before 2.7.
FROM = ("--from", "adamw")


def inside(name, saved):
    for key in FILES[name]:
        saved = saved[key]
    return saved


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def trained(kind):
    net = model()
    opt = torch.optim.AdamW(net.parameters(), lr=LR) if kind == "torch" else memopt.create(net, kind, lr=LR)
    drive(net, opt, 0, 3)
    return net, opt


@pytest.mark.parametrize("before", ["torch", "adamw-8bit"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_takes_the_place_of_another_under_a_spec(tmp_path, run, recwarn, name, before):
    net, theirs = trained(before)
    path, after = tmp_path / name, "adamw-4bit" if before == "adamw-8bit" else "adamw-8bit"
    torch.save(content(name, net, theirs), path)
    loaded = memopt.create(copy.deepcopy(net), after, lr=LR)
    loaded.load_state_dict(theirs.state_dict())  # which converts
    recwarn.clear()
    code, out, err = run("convert", str(path), str(path), "--to", after, *FROM)
    assert code == 0, err
    assert f"-> {after}" in out
    code, out, _ = run("inspect", str(path))
    assert (code, f"{after}, step 3, 6 parameters" in out) == (0, True)
    saved, whole = torch.load(path, weights_only=True), content(name, net, theirs)
    again = memopt.create(copy.deepcopy(net), after, lr=1.0)
    again.load_state_dict(inside(name, saved))
    assert not [w for w in recwarn if "converted" in str(w.message)]
    assert again.param_groups[0]["lr"] == LR
    for p, q in zip(loaded.param_groups[0]["params"], again.param_groups[0]["params"], strict=True):
        assert_same(loaded.state[p], again.state[q])
    if FILES[name]:  # all else is as it was
        replaced = inside(name, saved)
        inside(name, whole).clear()
        replaced.clear()
        assert_same(saved, whole)


def test_back_into_the_file_of_torchs_optimizer(tmp_path, run):
    net, ours = trained("adamw")
    path = tmp_path / "step=3.ckpt"
    torch.save(content(path.name, net, ours), path)
    assert run("convert", str(path), str(tmp_path / "theirs.ckpt"), "--to", "torch")[0] == 0
    saved = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    theirs = torch.optim.AdamW(net.parameters())
    theirs.load_state_dict(saved["optimizer_states"][0])
    assert torch.equal(theirs.state[net[0].weight]["exp_avg"], ours.state[net[0].weight]["exp_avg"])
    assert type(saved["state_dict"]) is OrderedDict
    assert saved["global_step"] == 3


def test_a_checkpoint_becomes_a_file_for_load_state_dict(tmp_path, run):
    """With what the user has put beside the state, and under a spec that splits the groups by rule."""
    net, ours = trained("adamw-8bit")
    ours.state[net[0].weight]["note"], ours.state["run"] = torch.arange(3), {"epoch": 4}
    memopt.save(tmp_path / "run", optimizer=ours)
    for to in ("adamw-8bit/zero1", "muon-8bit(adamw-8bit)"):
        fill = ["--fill", "momentum_buffer=0"] if to.startswith("muon") else []
        code, _, err = run("convert", str(tmp_path / "run"), str(tmp_path / "optimizer.pt"), "--to", to, *fill)
        assert code == 0, err
        other = memopt.create(copy.deepcopy(net), to, lr=1.0)
        other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        first = other.param_groups[0]["params"][0]
        assert other.state[first]["note"].tolist() == [0, 1, 2]
        assert other.state["run"] == {"epoch": 4}
        assert {group["lr"] for group in other.param_groups} == {LR}


def test_parameters_that_another_tool_has_not_stepped(tmp_path, run):
    net = model()
    net[1].requires_grad_(False)
    theirs = torch.optim.AdamW(net.parameters(), lr=LR)
    net(torch.ones(2, 128)).sum().backward()
    theirs.step()
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    assert run("convert", str(tmp_path / "optimizer.pt"), str(tmp_path / "out.pt"), "--to", "adamw-8bit", *FROM)[0] == 0
    assert run("convert", str(tmp_path / "out.pt"), str(tmp_path / "twice.pt"), "--to", "adamw-4bit")[0] == 0
    opt = memopt.create(net, "adamw-4bit")
    opt.load_state_dict(torch.load(tmp_path / "twice.pt", weights_only=True))
    assert [p in opt.state for p in net.parameters()] == [True, True, False, False, True, True]


def test_what_cannot_be_put_in_the_place_of_a_file_is_said(tmp_path, run):
    _, theirs = trained("torch")
    two = {"optimizer_states": [theirs.state_dict(), theirs.state_dict()]}
    torch.save(two, tmp_path / "gan.ckpt")
    code, _, err = run("convert", str(tmp_path / "gan.ckpt"), str(tmp_path / "out.ckpt"), "--to", "adamw")
    assert (code, "the states of 2 optimizers under 'optimizer_states', and one is read" in err) == (2, True)
    torch.save(
        {"optimizer": theirs.state_dict(), "size": torch.Size([2]), "kind": torch.device("cpu")}, tmp_path / "a.pt"
    )
    said = ("convert", str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--to", "adamw-8bit", *FROM)
    assert run(*said, "--dry-run")[0] == 0
    assert type(torch.load(tmp_path / "a.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg"]) is torch.Tensor
    assert run(*said)[0] == 0
    kept = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (type(kept["size"]), kept["kind"]) == (torch.Size, torch.device("cpu"))
