"""Checkpoint folders of DeepSpeed: read in one process and continued, and written for its engines."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import memopt
from tests.helpers import ranks
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
    model,
    ours_after,
    train,
)


def with_deepspeed(folder, exported):
    """What DeepSpeed's engines write to ``folder``, and how they go on from what was written for them."""
    deepspeed = _begin()
    return write(deepspeed, folder), go_on(deepspeed, exported)


def _begin():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed = ranks.deepspeed_on_gloo()
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def in_its_own_adam(exported):
    """The same in DeepSpeed's own optimizer, whose moments are in host memory."""
    deepspeed = _begin()
    return [_gone_on(deepspeed, exported, stage, own=True) for stage in (2, 3)]


def write(deepspeed, folder):
    """What each stage of DeepSpeed has when it saves and ``MORE`` steps later; in bf16 its masters."""
    found = {}
    for name, stage, bf16 in (("1", 1, False), ("2", 2, False), ("3", 3, False), ("bf16", 1, True)):
        engine = _engine(deepspeed, stage, bf16)
        _steps(engine, 0, STEPS)
        engine.save_checkpoint(f"{folder}/{name}", tag="now")
        begin = _whole(deepspeed, engine)
        if bf16:
            found[name] = _masters(engine)
            continue
        _steps(engine, STEPS, MORE)
        found[name] = begin, _whole(deepspeed, engine)
    return found


def go_on(deepspeed, exported):
    """The parameters ``MORE`` steps after loading what was written for each stage."""
    found = {stage: _gone_on(deepspeed, exported, stage) for stage in (1, 2, 3)}
    engine = _engine(deepspeed, 1, True, universal=True)
    engine.load_checkpoint(f"{exported}/bf16", tag=f"global_step{STEPS}")
    return {**found, "bf16": (_masters(engine), _whole(deepspeed, engine))}


def _gone_on(deepspeed, exported, stage, own=False):
    engine = _engine(deepspeed, stage, False, lr=1.0, universal=True, own=own)
    engine.load_checkpoint(f"{exported}/fp32")
    assert engine.global_steps == engine.lr_scheduler.last_epoch == STEPS
    optimizer = engine.optimizer.optimizer
    if stage == 3 and not own:  # torch.optim wants a tensor for each, see docs/checkpoints.md
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(state["step"]))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(LR, 0.1), (LR, 0.0)]
    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}
    _steps(engine, STEPS, MORE)
    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS + MORE}
    return _whole(deepspeed, engine)


def _masters(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def _engine(deepspeed, stage, bf16, lr=LR, universal=False, own=False):
    module = model()
    offload = {"offload_optimizer": {"device": "cpu"}} if own else {}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        # small sub-groups: several in a param group
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 3000,
            **offload,
        },
    }
    kind = deepspeed.ops.adam.DeepSpeedCPUAdam if own else torch.optim.AdamW
    opt = kind(groups(module), lr=lr)
    rates = torch.optim.lr_scheduler.StepLR(opt, 1000) if universal and not bf16 else None
    return deepspeed.initialize(model=module, optimizer=opt, config=config, lr_scheduler=rates)[0]


def _steps(engine, first, steps):
    for step in range(first, first + steps):
        x = batch(step, int(os.environ["RANK"])).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


def _whole(deepspeed, engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def write_for_deepspeed(folder):
    """What is written of an optimizer of ours; the parameters ``MORE`` steps later, and in bf16 our masters."""
    from memopt.cli import main

    module = model()
    with torch.no_grad():
        module[0].bias += 1.0  # not what an engine's model begins with
    opt = memopt.create(memopt.param_groups(module, weight_decay=0.1), "adamw", lr=LR)
    rates = torch.optim.lr_scheduler.StepLR(opt, 1000)
    train(module, opt, 0, STEPS)
    for _ in range(STEPS):
        rates.step()
    memopt.save(folder / "ours", model=module, optimizer=opt, scheduler=rates)
    assert main(["convert", str(folder / "ours"), str(folder / "fp32"), "--to", "deepspeed"]) == 0
    train(module, opt, STEPS, MORE)
    low = model(torch.bfloat16)
    opt = memopt.create(memopt.param_groups(low, weight_decay=0.1), "adamw-8bit+fp32", lr=LR)
    train(low, opt, 0, STEPS)
    memopt.save(folder / "ours-bf16", model=low, optimizer=opt)
    assert main(["convert", str(folder / "ours-bf16"), str(folder / "bf16"), "--to", "deepspeed"]) == 0
    masters = {name: opt.state[p]["master"] for name, p in low.named_parameters()}
    return {name: p.detach() for name, p in module.named_parameters()}, masters


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """``(folder, what was written for DeepSpeed, what DeepSpeed wrote and did)``"""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    exported = tmp_path_factory.mktemp("exported")
    ours = write_for_deepspeed(exported)
    return folder, exported, ours, ranks.run(with_deepspeed, WORLD, str(folder), str(exported))


@pytest.fixture(scope="module")
def zero(session):
    folder, _, _, both = session
    return folder, both[0][0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_going_on_in_deepspeed_is_going_on_here(session, stage):
    """From the universal checkpoint, on two ranks, in two param groups and several sub-groups."""
    _, _, (end, _), both = session
    for _, gone_on in both:
        assert distance(end, gone_on[stage]).max() < EXACT


@pytest.mark.slow
def test_going_on_in_deepspeeds_own_adam_is_going_on_here(session):
    """Which it compiles at first use."""
    _, exported, (end, _), _ = session
    for stages in ranks.run(in_its_own_adam, WORLD, str(exported)):
        for gone_on in stages:
            assert distance(end, gone_on).max() < EXACT


def test_masters_of_ours_are_masters_of_deepspeed(session):
    _, _, (_, masters), both = session
    for _, gone_on in both:
        theirs, weights = gone_on["bf16"]
        for name, master in masters.items():
            assert torch.equal(theirs[name], master)
            assert torch.equal(weights[name], master.bfloat16())


def test_what_is_written_for_deepspeed_is_read_back(session, run, tmp_path):
    _, exported, _, _ = session
    assert (exported / "fp32" / "latest_universal").read_text() == f"global_step{STEPS}"
    code, out, _ = run("inspect", str(exported / "fp32"))
    assert code == 0
    assert f"adamw of DeepSpeed, step {STEPS}, 5 parameters" in out
    for name, spec in (("ours", "adamw"), ("ours-bf16", "adamw+fp32")):
        module = model(torch.bfloat16 if "+" in spec else torch.float32)
        opt, again = (memopt.create(memopt.param_groups(module, weight_decay=0.5), spec) for _ in range(2))
        memopt.load(exported / name, model=module, optimizer=opt, rng=False)
        memopt.load(exported / {"ours": "fp32", "ours-bf16": "bf16"}[name], optimizer=again)
        assert [g["weight_decay"] for g in again.param_groups] == [0.1, 0.0]
        for p in module.parameters():
            for key, value in opt.state[p].items():
                assert torch.equal(value, again.state[p][key]), key


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
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        folder / stage / "now",
        "--output_folder",
        tmp_path / "now",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
        "--inject_missing_state",
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    begin, end = found[stage]
    assert distance(ours_after(tmp_path / "now", begin), end).max() < EXACT


@pytest.mark.parametrize(("stage", "spec"), [("1", "adamw"), ("3", "adamw"), ("bf16", "adamw+fp32")])
def test_what_ranks_wrote_becomes_universal(zero, stage, spec, run, tmp_path):
    """As ``ds_to_universal`` makes it: moments, masters and counters are the same bits."""
    folder, found = zero
    code, out, _ = run("convert", str(folder / stage), str(tmp_path / "universal"), "--to", "deepspeed")
    assert code == 0
    assert "dropped" not in out
    module = model(torch.bfloat16 if "+" in spec else torch.float32)
    a, b = (memopt.create(memopt.param_groups(module, weight_decay=0.5), spec) for _ in range(2))
    with torch.no_grad():
        for name, p in module.named_parameters():
            file = tmp_path / "universal" / f"global_step{STEPS}" / "zero" / name / "fp32.pt"
            exact = torch.load(file)["param"]
            assert torch.equal(exact, found[stage][name] if "+" in spec else found[stage][0][name])
            p.copy_(exact)
    for where, opt in ((folder / stage, a), (tmp_path / "universal", b)):
        memopt.load(where, optimizer=opt)
        assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    for p in module.parameters():
        assert a.state[p].keys() == b.state[p].keys()
        for key, value in a.state[p].items():
            assert torch.equal(value, b.state[p][key]), key


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
