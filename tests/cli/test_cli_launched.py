"""``--emit`` and ``--from``: launch configurations, ours and other people's."""

import json
from argparse import Namespace

import pytest

from estimators import InputError, estimate
from memopt.cli.flags.launched import _OPTIONS, read, read_into

STEP = ("llama-3.2-1b", "--seq", "512", "--batch", "2", "--checkpointing", "full")


SHARDED = [
    ("--world", "4", "--optim", "adamw-8bit/zero1"),
    ("--world", "4", "--optim", "adamw-8bit/zero3", "--mixed", "bf16"),
    ("--world", "4", "--optim", "adamw/zero2"),
    ("--world", "4", "--optim", "adamw-8bit/zero2", "--deepspeed", "--bucket", "1000000"),
    ("--world", "4", "--optim", "adamw/zero3", "--deepspeed", "--weights", "fp16"),
]


@pytest.mark.parametrize("kind", ["accelerate", "deepspeed", "transformers", "python"])
@pytest.mark.parametrize("more", SHARDED, ids=lambda m: "-".join(m[3:]))
def test_what_is_emitted_reads_back_to_the_same_figures(run, write, kind, more):
    if kind == "deepspeed" and "--mixed" in more:
        code, _, err = run("estimate", *STEP, *more, "--emit", kind)
        assert (code, "does not go with deepspeed" in err) == (2, True)
        return
    text = run("estimate", *STEP, *more, "--emit", kind)[1]
    if kind == "deepspeed":
        more = (*more, "--deepspeed")
    elif kind != "accelerate":
        compile(text, "emitted", "exec")
    want = json.loads(run("estimate", *STEP, *more, "--json")[1])
    assert json.loads(run("estimate", "--from", write(text), "--json")[1]) == want


class TestDeepSpeed:
    def test_ours_is_the_optimizer_that_runs(self, run, write):
        config = json.loads(run("estimate", *STEP, *SHARDED[3], "--emit", "deepspeed")[1])
        assert "optimizer" not in config
        assert config["zero_allow_untested_optimizer"] is True
        assert config["zero_force_ds_cpu_optimizer"] is False
        assert config["zero_optimization"]["stage"] == 2
        assert config["zero_optimization"]["reduce_bucket_size"] == 1_000_000
        assert "memopt.create(model, 'adamw-8bit'" in config["memopt"]["script"]

    @pytest.mark.slow
    def test_deepspeed_takes_what_is_emitted(self, run, write, monkeypatch):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed")
        from deepspeed.runtime.config import DeepSpeedConfig

        config = DeepSpeedConfig(write(run("estimate", *STEP, *SHARDED[3], "--emit", "deepspeed")[1], "ds.json"))
        assert (config.zero_config.stage, config.zero_config.reduce_bucket_size) == (2, 1_000_000)
        assert config.bfloat16_config.enabled
        assert config.optimizer_name is None
        assert config.zero_allow_untested_optimizer
        assert not config.zero_force_ds_cpu_optimizer

    def test_a_foreign_configuration_is_read(self, run, write):
        path = write(
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW"},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8, "overlap_comm": True},
            }
        )
        one = run("estimate", "gpt2", "--from", path, "--seq", "64", "--json")[1]
        two = run(
            "estimate",
            "gpt2",
            "--optim",
            "adamw/zero2",
            "--batch",
            "2",
            "--accumulate",
            "4",
            "--seq",
            "64",
            "--world",
            "2",
            "--deepspeed",
            "--bucket",
            "400000000",
            "--weights",
            "bf16",
            "--json",
        )[1]
        assert json.loads(one) == json.loads(two)

    def test_auto_is_left_to_the_command_line(self, write):
        options = read(
            write(
                {
                    "train_micro_batch_size_per_gpu": "auto",
                    "bf16": {"enabled": "auto"},
                    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
                }
            )
        )
        assert options["batch"] is options["bucket"] is None
        assert options["optim"] == ["adamw/zero3"]

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"zero_optimization": {"stage": 4}}, "stage 4"),
            ({"zero_optimization": {"stage": True}}, "stage True"),
            ({"zero_optimization": []}, "zero_optimization=a list"),
            ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
            ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
            ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
            ({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, "not a multiple"),
            ({"train_micro_batch_size_per_gpu": -1}, "whole number"),
            ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "none, cpu, nvme"),
        ],
    )
    def test_what_is_not_known_is_refused(self, write, config, words):
        with pytest.raises(InputError, match=words):
            read(write(config))

    @pytest.mark.parametrize("ranks", [1, 4, 64])
    def test_rows_add_up_to_2n_and_18n_over_w(self, ranks):
        column = estimate("8B", "adamw/zero2", world_size=ranks, deepspeed=True).columns[0]
        kept = sum(r.nbytes for r in column.rows if r.what != "temporaries")
        assert kept == pytest.approx(2 * 8 * 10**9 + 18 * 8 * 10**9 // ranks, abs=64)

    @pytest.mark.slow
    def test_that_is_deepspeeds_own_function(self, monkeypatch):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed")
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs

        assert theirs(8 * 10**9, 4, 1, cpu_offload=False)[1] == 2 * 8 * 10**9 + 18 * 8 * 10**9 // 4

    def test_state_is_that_of_the_flat_tensor(self):
        import memopt

        e = estimate("gpt2", "adamw-8bit/zero2", world_size=3, deepspeed=True)
        part = -(-e.parameters // 6) * 2
        flat = memopt.price({"flat": (part,)}, "adamw-8bit", dtype="float32").nbytes
        assert e.columns[0].nbytes("state") == flat + 4 * part

    @pytest.mark.parametrize("spec", ["adafactor/zero2", "came-8bit/zero3", "lamb/zero1"])
    def test_state_of_a_spec_that_needs_shapes_is_of_the_rows_behind_it(self, spec):
        import memopt
        from estimators import resolve
        from memopt.partitions.deepspeed.spans import share

        e = estimate("gpt2", spec, world_size=3, deepspeed=True)
        shapes, (plain, _, stage) = dict(resolve("gpt2").shapes), spec.partition("/zero")
        priced = [memopt.price(shapes, plain, world_size=3, rank=r, deepspeed=int(stage)).nbytes for r in range(3)]
        assert e.columns[0].nbytes("state") == max(priced) + 4 * share(e.parameters, 3)

    def test_a_master_is_deepspeeds_own(self):
        with pytest.raises(InputError, match="leave out"):
            estimate("gpt2", "adamw+kahan/zero2", deepspeed=True)

    def test_what_is_refused_is_what_the_configuration_refuses(self):
        import memopt
        from estimators.memory.deepspeed import stage

        for spec in memopt.specs():
            if (spec.partition, spec.placement, spec.master) != ("zero2", "device", "none") or spec.rule == "sgd":
                continue
            refused = []
            for check in (stage, memopt.deepspeed_config):
                try:
                    check(spec)
                    refused.append(False)
                except ValueError:
                    refused.append(True)
            assert refused[0] == refused[1], str(spec)

    def test_offload_is_deepspeeds(self, run):
        argv = ("--optim", "adamw@cpu/zero2", "--world", "2", "--emit", "deepspeed")
        config = json.loads(run("estimate", "gpt2", *argv)[1])
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert "memopt.create(model, 'adamw', lr" in config["memopt"]["script"]
        e = estimate("gpt2", "adamw@cpu/zero2", world_size=2, deepspeed=True)
        assert e.columns[0].nbytes("state", "GPU") == 0

    def test_contradictions(self):
        for given in ({"bucket": 5}, {"deepspeed": True, "mixed": "bf16"}, {"mixed": "bf16", "weights": "bf16"}):
            with pytest.raises(InputError):
                estimate("gpt2", **given)


def test_accelerate_reads_what_is_emitted(run, write):
    args = pytest.importorskip("accelerate.commands.config.config_args")
    for more, kind in zip(SHARDED, ("MULTI_GPU", "FSDP", "FSDP", "DEEPSPEED", "DEEPSPEED"), strict=True):
        path = write(run("estimate", *STEP, *more, "--emit", "accelerate")[1], "emitted.yaml")
        config = args.load_config_from_file(path)
        assert str(config.distributed_type).rpartition(".")[2] == kind
        assert config.num_processes == 4


def test_the_command_line_wins(write):
    args = Namespace(**{**dict.fromkeys(_OPTIONS), "world": "1"})
    args.model, args.optim = "gpt2", ["lion"]
    read_into(args, write({"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 3}))
    assert (args.model, args.optim, args.batch, args.deepspeed) == ("gpt2", ["lion"], "3", True)


def test_hostile_options_are_one_sentence(run, write):
    for options in (
        {"model": [1]},
        {"model": "gpt2", "gpu": {}},
        {"model": "gpt2", "weights": ["x"]},
        {"model": "gpt2", "seq": {}},
        {"model": "gpt2", "deepspeed": "perhaps"},
    ):
        code, out, err = run("estimate", "--from", write({"memopt": {"estimate": options}}))
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_no_file_is_a_traceback():
    """2,000 configurations with values of every kind in places of every kind."""
    import random

    from memopt.cli.flags.launched import accelerate, deepspeed

    chance = random.Random(0)
    values = [
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        -1,
        5e8,
        float("nan"),
        float("inf"),
        10**40,
        "auto",
        "cpu",
        "none",
        "bf16",
        "FSDP",
        "DEEPSPEED",
        "MULTI_GPU",
        "FULL_SHARD",
        "",
        "x" * 99,
        [],
        [1],
        {},
        {"type": "AdamW"},
        {"device": "cpu"},
        {"device": []},
        {"enabled": True},
        {"enabled": 7},
        {"stage": 2},
        {"stage": "2"},
        {"deepspeed_config_file": "/nowhere"},
        {"zero_stage": [3]},
    ]
    theirs = (
        "optimizer",
        "zero_optimization",
        "bf16",
        "fp16",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "memopt",
    )
    inner = ("stage", "offload_optimizer", "offload_param", "overlap_comm", "reduce_bucket_size")
    asked = ("distributed_type", "num_processes", "mixed_precision", "fsdp_config", "deepspeed_config")
    fsdp = ("fsdp_offload_params", "fsdp_sharding_strategy", "fsdp_reshard_after_forward")
    read_, refused = 0, 0
    for i in range(2000):
        config = {key: chance.choice(values) for key in chance.sample((theirs, asked)[i % 2], chance.randint(0, 3))}
        part = {key: chance.choice(values) for key in chance.sample((inner, fsdp)[i % 2], chance.randint(0, 2))}
        if i % 3:
            config[("zero_optimization", "fsdp_config")[i % 2]] = part
        try:
            (deepspeed, accelerate)[i % 2](config, "file")
            read_ += 1
        except (InputError, FileNotFoundError):
            refused += 1
    assert min(read_, refused) > 50
