"""Folders of torch.distributed.checkpoint: FSDP's state read in one process and continued, and written for FSDP."""

import os
import shutil

import pytest
import torch

import memopt
from tests.helpers import ranks, sharded
from tests.helpers.folders import (
    EXACT,
    LR,
    MEAN_DISTANCE,
    MORE,
    STEPS,
    WORLD,
    batch,
    distance,
    groups,
    losses,
    model,
    ours_after,
    train,
)


def write_with_fsdp(folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = model()
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    opt = torch.optim.AdamW(groups(module), lr=LR)
    _fsdp_steps(module, opt, 0, STEPS)
    begin = {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}
    state = {"model": get_model_state_dict(module), "optim": get_optimizer_state_dict(module, opt)}
    dcp.save(state, checkpoint_id=f"{folder}/nested")
    flat = get_optimizer_state_dict(module, opt, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"optimizer": flat}, checkpoint_id=f"{folder}/flat")
    _fsdp_steps(module, opt, STEPS, MORE)
    end = {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}
    return begin, end, save_sharded(folder)


def _fsdp_steps(module, opt, first, steps):
    for step in range(first, first + steps):
        module(batch(step, int(os.environ["RANK"]))).square().mean().backward()
        opt.step()
        opt.zero_grad()


SHARDED = ["adamw-8bit/zero3", "adamw+fp32/zero3"]


def save_sharded(folder):
    """The weights in fp32, as they are kept."""
    found = {}
    for i, spec in enumerate(SHARDED):
        module = model(torch.bfloat16)
        memopt.shard(module, spec)
        opt = memopt.create(module, spec, lr=LR)
        train(module, opt, 0, 2)
        memopt.save(f"{folder}/{i}", model=module, optimizer=opt)
        states = opt.state_dict()["state"].values()
        found[spec] = {
            name: sharded.whole(state["master"]) if "+" in spec else sharded.whole(p).float()
            for (name, p), state in zip(module.named_parameters(), states, strict=True)
        }
    return found


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, *ranks.run(write_with_fsdp, WORLD, str(folder))[0]


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_going_on_from_dcp_is_going_on_under_fsdp(fsdp, name):
    folder, begin, end, _ = fsdp
    assert distance(ours_after(folder / name, begin), end).max() < EXACT
    assert distance(ours_after(folder / name, begin, "adamw-8bit"), end).mean() < MEAN_DISTANCE * LR


def test_the_command_line_converts_and_inspects_a_folder(fsdp, tmp_path, capsys):
    from memopt.cli import main

    assert main(["inspect", str(fsdp[0] / "nested")]) == 0
    assert "adamw of torch.distributed.checkpoint, step 3, 5 parameters" in capsys.readouterr().out
    assert main(["convert", str(fsdp[0] / "flat"), str(tmp_path / "run"), "--to", "adamw-4bit"]) == 0
    module = model()
    opt = memopt.create(memopt.param_groups(module, weight_decay=0.1), "adamw-4bit")
    memopt.load(tmp_path / "run", optimizer=opt, rng=False)
    assert all(state["step"] == STEPS for state in opt.state.values())


def go_on_under_fsdp(folder, begin):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = model()
    module.load_state_dict(begin)
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    opt = torch.optim.AdamW(groups(module), lr=1.0)
    state = {"optimizer": get_optimizer_state_dict(module, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(module, opt, state["optimizer"])
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(LR, 0.1), (LR, 0.0)]
    _fsdp_steps(module, opt, STEPS, MORE)
    return {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}


def test_what_is_written_for_dcp_goes_on_under_fsdp(tmp_path, capsys):
    from memopt.cli import main

    module = model()
    decay = [(n, p) for n, p in module.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in module.named_parameters() if p.dim() == 1]
    named = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    opt = memopt.create(named, "adamw", lr=LR)
    train(module, opt, 0, STEPS)
    memopt.save(tmp_path / "ours", optimizer=opt)
    begin = {name: p.detach().clone() for name, p in module.state_dict().items()}
    train(module, opt, STEPS, MORE)
    out = str(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "ours"), out, "--to", "dcp"]) == 0
    end = dict(module.named_parameters())
    for theirs in ranks.run(go_on_under_fsdp, WORLD, out, begin):
        assert distance(end, theirs).max() < EXACT
    assert main(["convert", out, str(tmp_path / "back"), "--to", "adamw"]) == 0
    back = memopt.create(named, "adamw")
    memopt.load(tmp_path / "back", optimizer=back, rng=False)
    assert all(state["step"] == STEPS for state in back.state.values())
    assert main(["convert", str(tmp_path / "ours"), out, "--to", "dcp"]) == 2
    assert f"{out} exists" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RAdam", "SGD", "RMSprop", "Adafactor"])
def test_what_is_written_for_dcp_has_every_key_that_is_asked_for(kind):
    from memopt.checkpoint.exporting import export
    from memopt.checkpoint.importers import read_state_dict

    module = model()
    more = {"momentum": 0.9} if kind == "SGD" else {}
    theirs = getattr(torch.optim, kind)(module.named_parameters(), lr=LR, **more)
    losses(module, 0).backward()
    theirs.step()
    saved = theirs.state_dict()
    written = export(read_state_dict(saved, "theirs", kind.lower()), "dcp")
    names = [name for name, _ in module.named_parameters()]
    assert list(written["state"]) == written["param_groups"][0]["params"] == names
    assert set(written["param_groups"][0]) >= set(saved["param_groups"][0]) - {"param_names"}
    for name, state in zip(names, saved["state"].values(), strict=True):
        assert set(written["state"][name]) == set(state)


def test_a_damaged_folder_is_named(fsdp, tmp_path):
    shutil.copytree(fsdp[0] / "flat", tmp_path / "flat")
    file = tmp_path / "flat" / "__1_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    opt = memopt.create(memopt.param_groups(model(), weight_decay=0.1), "adamw")
    with pytest.raises(ValueError, match=r"__1_0\.distcp is truncated"):
        memopt.load(tmp_path / "flat", optimizer=opt)
    metadata = tmp_path / "flat" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"\.metadata cannot be read without executing what it says, or is damaged"):
        memopt.load(tmp_path / "flat", optimizer=opt)


def test_weights_of_a_sharded_model_are_written_whole_for_deepspeed(fsdp, run, tmp_path):
    """The model's rows are in the ranks' files; what a master keeps stands beside them."""
    folder, *_, found = fsdp
    for i, spec in enumerate(SHARDED):
        out = tmp_path / f"theirs{i}"
        assert run("convert", str(folder / str(i)), str(out), "--to", "deepspeed")[0] == 0
        for name, exact in found[spec].items():
            content = torch.load(out / "global_step2" / "zero" / name / "fp32.pt")["param"]
            assert torch.equal(content, exact), name
