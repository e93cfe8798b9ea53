"""The optimizer inside other people's loops."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits


def test_accelerate_prepares_accumulates_clips_saves_and_loads(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(80, 64)
    optimizer = memopt.create(model, "adamw-8bit", lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    data = torch.utils.data.DataLoader(torch.randn(32, 80), batch_size=4)
    model, prepared, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    losses = []
    for epoch in range(4):
        for x in data:
            with accelerator.accumulate(model):
                loss = model(x).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                schedule.step()
                prepared.zero_grad()
            losses.append(loss.item())
        if epoch == 1:
            accelerator.save_state(str(tmp_path))
            saved = {k: v.clone() for k, v in optimizer.state[model.weight].items()}
    assert losses[-1] < losses[0]
    assert int(optimizer.state[model.weight]["step"]) == 16
    accelerator.load_state(str(tmp_path))
    for key, value in optimizer.state[model.weight].items():
        assert_same_bits(value, saved[key], key)
    other = accelerate.Accelerator(cpu=True)
    again = nn.Linear(80, 64)
    prepared = other.prepare(again, changed := memopt.create(again, "adamw-4bit", lr=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(changed, 10)
    other.register_for_checkpointing()
    other.prepare(schedule)
    with pytest.warns(UserWarning, match="adamw-8bit was converted to adamw-4bit"):
        other.load_state(str(tmp_path))
    assert float(changed.state[again.weight]["step"]) == float(saved["step"])
    assert prepared[1].optimizer is changed


def test_transformers_trainer_trains_and_resumes(tmp_path, run):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": (x := torch.randint(0, 100, (16,), generator=g)), "labels": x} for _ in range(32)]

    def trainer(cls, **keywords):
        torch.manual_seed(0)
        return transformers.Trainer(
            transformers.LlamaForCausalLM(config),
            transformers.TrainingArguments(
                str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[]
            ),
            train_dataset=data,
            optimizer_cls_and_kwargs=(cls, {"lr": 1e-2, **keywords}),
        )

    def last_loss(trained):
        return trained.evaluate(data)["eval_loss"]

    whole = trainer(memopt.Optimizer, spec="adamw-8bit")
    whole.args.adam_beta2 = 0.98
    with pytest.warns(UserWarning, match=r"Trainer does not hand its arguments.*adam_beta2 \(0\.9, 0\.98\)"):
        whole.train()
    halfway = str(tmp_path / "checkpoint-3")
    resumed = trainer(memopt.Optimizer, spec="adamw-8bit")
    resumed.train(resume_from_checkpoint=halfway)
    assert resumed.state.global_step == 6
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(p, q)
    # The string was changed in the meantime.
    for spec in ("adamw-4bit", "adamw"):
        other = trainer(memopt.Optimizer, spec=spec)
        with pytest.warns(UserWarning, match=f"adamw-8bit was converted to {spec}"):
            other.train(resume_from_checkpoint=halfway)
        assert other.state.global_step == 6
        assert last_loss(other) == pytest.approx(last_loss(whole), rel=2e-3)
    # The run was begun with torch's optimizer.
    theirs = trainer(torch.optim.AdamW)
    theirs.train()
    other = trainer(memopt.Optimizer, spec="adamw-8bit")
    with pytest.warns(UserWarning, match=r"adamw of torch\.optim was converted to adamw-8bit"):
        other.train(resume_from_checkpoint=halfway)
    assert last_loss(other) == pytest.approx(last_loss(theirs), rel=2e-3)
    # The same by the command line beforehand: optimizer.pt in the place of itself, to the bit.
    assert run("convert", f"{halfway}/optimizer.pt", f"{halfway}/optimizer.pt", "--to", "adamw-8bit")[0] == 0
    beforehand = trainer(memopt.Optimizer, spec="adamw-8bit")
    beforehand.train(resume_from_checkpoint=halfway)
    for p, q in zip(other.model.parameters(), beforehand.model.parameters(), strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize(
    ("arguments", "keywords", "said"),
    [
        ({"learning_rate": 2e-4}, {}, "learning_rate 0.0002 (lr is 0.001 here)"),
        ({"learning_rate": 2e-4}, {"lr": 1e-2}, ""),
        ({"adam_beta2": 0.95}, {"lr": 1e-2}, "adam_beta1, adam_beta2 (0.9, 0.95) (betas is (0.9, 0.999) here)"),
        ({"adam_beta2": 0.95}, {"lr": 1e-2, "betas": (0.9, 0.99)}, ""),
        ({"adam_beta2": 0.95}, {"lr": 1e-2, "spec": "sgd"}, ""),
        ({}, {"lr": 1e-2, "spec": "lion"}, ""),
    ],
)
def test_arguments_that_trainer_does_not_hand_on_are_said(arguments, keywords, said, recwarn):
    """As Trainer.create_optimizer calls the class; that it is called so is in the test above."""

    @dataclasses.dataclass
    class TrainingArguments:
        learning_rate: float = 5e-5
        adam_beta1: float = 0.9
        adam_beta2: float = 0.999
        adam_epsilon: float = 1e-8

    class Trainer:
        args = TrainingArguments(**arguments)

    inside = {"__name__": "transformers.trainer"}
    exec("def create_optimizer(self, cls, groups, kwargs):\n    return cls(groups, **kwargs)", inside)
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.0}]
    inside["create_optimizer"](Trainer(), memopt.Optimizer, groups, {"spec": "adamw", **keywords})
    assert [said in str(w.message) for w in recwarn if "does not hand its arguments" in str(w.message)] == [
        True
    ] * bool(said)


def step_under_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = []
    for spec, original in (("adamw-8bit", True), ("adamw-8bit/zero3", True), ("adamw", False)):
        model = nn.Linear(80, 64)
        before = memopt.create(model, spec)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
        wrapped(torch.ones(1, 80)).sum().backward()
        for made in (before.step, lambda wrapped=wrapped, spec=spec: memopt.create(wrapped, spec).step()):
            try:
                found.append(str(made()))
            except (RuntimeError, ValueError) as error:
                found.append(str(error))
    return found


def test_fsdp1_is_refused_by_name():
    """Wrapped after the optimizer was made, with the parameters as they are (without, they are gone), and before."""
    (found,) = ranks.run(step_under_fsdp1, 1)
    said = ["FSDP1 (FullyShardedDataParallel), which has no rows; use FSDP2" in one for one in found]
    assert said == [True, True, True, True, False, True], found


def step_a_sharded_model():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(80, 64)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = memopt.create(model, "adamw")
    model(torch.ones(1, 80)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), len(optimizer.state)


def test_sharded_parameters_are_refused_with_the_reason():
    ((message, states),) = ranks.run(step_a_sharded_model, 1)
    assert "weight is a DTensor" in message
    assert "write 'adamw/zero3'" in message
    assert states == 0


REPLACED = """
import importlib, json, os, sys, warnings
import torch, accelerate, memopt
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # it would be compiled, for a minute
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

def said():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        memopt.create(torch.nn.Linear(8, 8), "adamw-8bit")
    return [str(w.message) for w in found if "in the place of memopt's" in str(w.message)]

cases, answers = json.loads(sys.argv[1]), []
for how, config in cases:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, **config}
    if how == "accelerate":
        accelerate.Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    elif how == "TrainingArguments":
        kept = HfDeepSpeedConfig(config)  # what they make
    else:
        with open(sys.argv[2], "w") as file:
            json.dump(config, file)
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = sys.argv[2]
    answers.append(said())
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    unset_hf_deepspeed_config()
print(json.dumps(answers))
"""
OFFLOADS = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
REPLACING = [
    ("accelerate", {**OFFLOADS}, "DeepSpeed's own CPU Adam"),
    ("accelerate", {**OFFLOADS, "zero_force_ds_cpu_optimizer": False}, ""),
    ("accelerate", {"optimizer": {"type": "AdamW"}}, '"optimizer" section (AdamW)'),
    ("accelerate", {"zero_optimization": {"stage": 2}}, ""),
    ("TrainingArguments", {"optimizer": {"type": "Lion"}}, '"optimizer" section (Lion)'),
    ("accelerate launch", {"optimizer": {"type": "AdamW"}}, '"optimizer" section (AdamW)'),
    ("accelerate launch", {"zero_optimization": {"stage": 3}}, ""),
]


def test_what_would_step_in_the_place_of_ours_is_said(tmp_path):
    for name in ("accelerate", "deepspeed", "transformers"):
        pytest.importorskip(name)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_DEEPSPEED": "true"}
    command = [sys.executable, "-c", REPLACED, json.dumps([case[:2] for case in REPLACING]), str(tmp_path / "ds.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (*_, words), said in zip(REPLACING, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert len(said) == bool(words)
        assert all(words in one and "zero_allow_untested_optimizer" in one for one in said)
