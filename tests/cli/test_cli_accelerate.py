"""``--from`` a file that ``accelerate config`` writes."""

import json

import pytest

from estimators import InputError
from memopt.cli.flags.launched import read

yaml = pytest.importorskip("yaml")

ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", "num_processes": 8}


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({"distributed_type": "MULTI_GPU"}, ("--optim", "adamw", "--mixed", "bf16")),
        ({"distributed_type": "NO", "num_processes": 1, "mixed_precision": "no"}, ("--optim", "adamw")),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_reshard_after_forward": True,
                    "fsdp_activation_checkpointing": True,
                },
            },
            ("--optim", "adamw/zero3", "--mixed", "bf16", "--checkpointing", "full"),
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}},
            ("--optim", "adamw/zero2", "--mixed", "bf16"),
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "zero_stage": 2,
                    "gradient_accumulation_steps": 4,
                    "offload_optimizer_device": "none",
                    "offload_param_device": "none",
                },
            },
            ("--optim", "adamw/zero2", "--deepspeed", "--weights", "bf16", "--accumulate", "4"),
        ),
    ],
    ids=["ddp", "one", "fsdp2", "fsdp1", "deepspeed"],
)
def test_it_is_read(run, write, more, flags):
    config = {**ACCELERATE, **more}
    path = write(yaml.safe_dump(config), "accelerate.yaml")
    world = ("--world", str(config["num_processes"]))
    one = run("estimate", "gpt2", "--seq", "64", "--from", path, "--json")[1]
    two = run("estimate", "gpt2", "--seq", "64", *world, *flags, "--json")[1]
    assert json.loads(one) == json.loads(two)


def test_deepspeeds_file_beside_it(run, write):
    write({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, "ds.json")
    config = {
        **ACCELERATE,
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": "ds.json"},
    }
    options = read(write(yaml.safe_dump(config), "accelerate.yaml"))
    assert (options["optim"], options["weights"], options["world"]) == (["adamw/zero3"], "float16", 8)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM"),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"}, "fp8"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}, "fsdp_offload_params"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}}, "HYBRID_SHARD"),
        ({"distributed_type": "MULTI_GPU", "num_processes": "many"}, "num_processes"),
        ({"distributed_type": "FSDP", "fsdp_config": 3}, "fsdp_config=3"),
    ],
)
def test_what_is_not_known_is_refused(write, more, words):
    with pytest.raises(InputError, match=words):
        read(write(yaml.safe_dump({**ACCELERATE, **more})))


def test_any_other_file_is_one_sentence(write):
    for text in ("", "a: [", "- 1", "x", "\0", "a: &a [*a]", "!!python/object:os.system {}"):
        with pytest.raises(InputError):
            read(write(text))
