"""Checkpoint folders that several ranks of another tool wrote: read in one process, continued, and never executed."""

import importlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

import memopt
from memopt.checkpoint.foreign import inert

LR = 1e-3
STEPS, MORE = 3, 2
#: Sums of gradients in another order; a hundredth of a step.
EXACT = 1e-5
#: Mean distance after two steps from 8-bit codes, as a share of the rate.
MEAN_DISTANCE = 0.05
WORLD = 2


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 65), nn.LayerNorm(65), nn.Linear(65, 129, bias=False)).to(dtype)


def groups(module):
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() == 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def batch(step, rank):
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))


def losses(module, step):
    """The mean of all ranks' losses."""
    dtype = next(module.parameters()).dtype
    return sum(module(batch(step, r).to(dtype)).float().square().mean() for r in range(WORLD)) / WORLD


def ours_after(folder, begin, spec="adamw", **keywords):
    """The parameters when ours goes on from the folder for the rest of the steps."""
    module = model()
    module.load_state_dict(begin)
    opt = memopt.create(memopt.param_groups(module, weight_decay=0.1), spec, lr=1.0)
    memopt.load(folder, optimizer=opt, **keywords)
    assert opt.param_groups[0]["lr"] == LR
    for step in range(STEPS, STEPS + MORE):
        losses(module, step).backward()
        opt.step()
        opt.zero_grad()
    return dict(module.named_parameters())


def distance(a, b):
    return torch.cat([(a[name].detach() - b[name]).abs().flatten() for name in b])


# DeepSpeed -------------------------------------------------------------------------------------------------------


def write_with_deepspeed(folder):
    """What each stage of DeepSpeed has when it saves and ``MORE`` steps later; in bf16 its masters."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # it would be compiled, for speed
    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for name, stage, bf16 in (("1", 1, False), ("2", 2, False), ("3", 3, False), ("bf16", 1, True)):
        engine = _engine(deepspeed, stage, bf16)
        _steps(engine, 0, STEPS)
        engine.save_checkpoint(f"{folder}/{name}", tag="now")
        begin = _whole(deepspeed, engine)
        if bf16:
            found[name] = {n: safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()}
            continue
        _steps(engine, STEPS, MORE)
        found[name] = begin, _whole(deepspeed, engine)
    return found


def _engine(deepspeed, stage, bf16):
    module = model()
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0, "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        # small sub-groups: several in a param group
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000},
    }  # fmt: skip
    opt = torch.optim.AdamW(groups(module), lr=LR)
    return deepspeed.initialize(model=module, optimizer=opt, config=config)[0]


def _steps(engine, first, steps):
    for step in range(first, first + steps):
        x = batch(step, int(os.environ["RANK"])).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


def _whole(deepspeed, engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, ranks.run(write_with_deepspeed, WORLD, str(folder))[0]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_going_on_from_zero_is_going_on_in_deepspeed(zero, stage):
    folder, found = zero
    begin, end = found[stage]
    assert distance(ours_after(folder / stage, begin), end).max() < EXACT
    assert distance(ours_after(folder / stage / "now", begin, "adamw-8bit"), end).mean() < MEAN_DISTANCE * LR


def test_masters_of_deepspeed_are_masters_here(zero):
    folder, found = zero
    module = model(torch.bfloat16)
    opt = memopt.create(memopt.param_groups(module, weight_decay=0.1), "adamw+fp32")
    module.load_state_dict({name: master.bfloat16() for name, master in found["bf16"].items()})
    memopt.load(folder / "bf16", optimizer=opt)
    for name, p in module.named_parameters():
        assert torch.equal(opt.state[p]["master"], found["bf16"][name])
        assert opt.state[p]["step"] == STEPS
    dropped = memopt.load(folder / "bf16", optimizer=memopt.create(opt.param_groups, "adamw")).conversion.dropped
    assert dropped == ["master"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_universal_checkpoint_is_the_one_it_was_made_of(zero, stage, tmp_path):
    folder, found = zero
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / stage / "now",
               "--output_folder", tmp_path / "now", "--num_extract_workers", "1", "--num_merge_workers", "1",
               "--inject_missing_state"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    begin, end = found[stage]
    assert distance(ours_after(tmp_path / "now", begin), end).max() < EXACT


def test_a_rank_that_is_missing_and_a_file_cut_short_are_said(zero, tmp_path):
    shutil.copytree(zero[0] / "1" / "now", tmp_path / "now")
    last = sorted((tmp_path / "now").glob("*optim_states.pt"))[-1]
    content = last.read_bytes()
    opt = memopt.create(model(), "adamw")
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=last.name):
        memopt.load(tmp_path / "now", optimizer=opt)
    last.unlink()
    with pytest.raises(ValueError, match="has the optimizer state of 1 ranks, and 2 wrote it"):
        memopt.load(tmp_path / "now", optimizer=opt)
    assert not opt.state


# torch.distributed.checkpoint -------------------------------------------------------------------------------------


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
    return begin, {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}


def _fsdp_steps(module, opt, first, steps):
    for step in range(first, first + steps):
        module(batch(step, int(os.environ["RANK"]))).square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, *ranks.run(write_with_fsdp, WORLD, str(folder))[0]


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_going_on_from_dcp_is_going_on_under_fsdp(fsdp, name):
    folder, begin, end = fsdp
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
    for step in range(STEPS + MORE):
        if step == STEPS:
            memopt.save(tmp_path / "ours", optimizer=opt)
            begin = {name: p.detach().clone() for name, p in module.state_dict().items()}
        losses(module, step).backward()
        opt.step()
        opt.zero_grad()
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
    from memopt.checkpoint.foreign import read_state_dict

    module = model()
    more = {"momentum": 0.9} if kind == "SGD" else {}
    theirs = getattr(torch.optim, kind)(module.named_parameters(), lr=LR, **more)
    losses(module, 0).backward()
    theirs.step()
    saved = theirs.state_dict()
    written = export(read_state_dict(saved, "theirs"), "dcp")
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


# Nothing is executed ----------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(exec, "raise SystemExit"), (os.system, "exit 1"), (getattr, "x")])
def test_metadata_is_not_executed(tmp_path, call):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil(*call)}))
    with pytest.raises(ValueError, match=rf"it names \S+\.{call[0].__name__}"):
        memopt.load(tmp_path, optimizer=memopt.create(model(), "adamw"))


def test_deepspeeds_files_are_not_executed(tmp_path):
    torch.save({"param_shapes": Evil(exec, "raise SystemExit")}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt cannot be read .* it names \S*exec"):
        memopt.load(tmp_path, optimizer=memopt.create(model(), "adamw"))


def test_a_class_that_is_known_stands_for_nothing_but_its_values():
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    modules = ("torch.distributed.checkpoint.metadata",)
    found = inert.tree(pickle.dumps([MetadataIndex("a"), BytesStorageMetadata()]), modules, "x")
    assert [type(x).__mro__[1] for x in found] == [inert.Inert, inert.Inert]
    assert found[0].fqn == "a"
    assert Path(sys.modules[MetadataIndex.__module__].__file__).name == "metadata.py"


def test_a_value_of_an_enumeration_as_python_3_11_writes_it():
    from torch.distributed.checkpoint.metadata import MetadataIndex

    class Value(Evil):
        def __init__(self, *arguments):
            self.call = getattr, arguments

    modules = ("torch.distributed.checkpoint.metadata",)
    found = inert.tree(pickle.dumps(Value(MetadataIndex, "NAME")), modules, "x")
    assert isinstance(found, inert.Inert)
    assert found.arguments == ("NAME",)
    for arguments in (("text", "upper"), (MetadataIndex, "NAME", None)):
        with pytest.raises(ValueError, match=r"it names builtins\.getattr"):
            inert.tree(pickle.dumps(Value(*arguments)), modules, "x")
