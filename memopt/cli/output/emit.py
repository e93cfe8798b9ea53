"""``--emit``: the chosen row as a configuration that can be launched, which ``--from`` reads back to the same figures.

Every file holds the options of ``memopt estimate``: in a comment on its first line, and in JSON, which has no comments,
under the key ``memopt``. That, and nothing else in the file, is what ``--from`` reads
(:mod:`memopt.cli.flags.launched`).
"""

from __future__ import annotations

import json
from typing import Any

from estimators.errors import InputError, shown
from estimators.result import Column, Estimate
from estimators.training import Training

#: Options that are said with --seq alone, and with DeepSpeed; a script's device is where it runs.
_OF_SEQ, _OTHERS = ("seq", "batch", "accumulate", "checkpointing", "attention"), ("bucket", "device")
#: Options that are said where they are not the default, whatever --seq says.
_SAID = tuple(name for name in Training._fields if name not in (*_OF_SEQ, *_OTHERS))
#: Options that the script has to see to.
_BESIDE = ("frozen", "train", "loss", "outputs", "offload_activations", "offload_params", "compile", "float8")
KINDS = ("accelerate", "deepspeed", "transformers", "python")
MARK = "# memopt estimate: "
#: Where accelerate's configuration points for DeepSpeed's.
_DS_CONFIG = "ds_config.json"
#: transformers' class for families that are no causal language models.
_AUTO = {
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "vit": "AutoModelForImageClassification",
    **dict.fromkeys(("bert", "distilbert", "roberta", "xlm-roberta"), "AutoModelForMaskedLM"),
}
#: Placements that stand for DeepSpeed's offload_optimizer.
_OFFLOADED = ("cpu", "host")


def chosen(e: Estimate) -> Column:
    """The first spec that fits, or the first."""
    return next((c for c in e.columns if e.gpu is not None and not c.over(e.gpu)), e.columns[0])


def emit(kind: str, e: Estimate) -> str:
    if kind not in KINDS:
        raise InputError(f"--emit {shown(kind)} is not allowed; it is one of {', '.join(KINDS)}")
    column = chosen(e)
    t = e.training
    if t.tp * t.pp * t.cp * t.ep * t.replicas > 1 and kind != "python":
        raise InputError(
            f"--emit {kind} says nothing about tp, pp, cp, ep and replicas; --emit python has them as options"
        )
    options = _options(e, column)
    if kind == "deepspeed":
        return (
            json.dumps({**_deepspeed(e, column), "memopt": {**_script(e, column), "estimate": options}}, indent=2)
            + "\n"
        )
    body = {"accelerate": _accelerate, "transformers": _transformers, "python": _python}[kind](e, column)
    return f"{MARK}{json.dumps(options)}\n{body}"


def _options(e: Estimate, column: Column) -> dict[str, Any]:
    t = e.training
    model = str(e.parameters) if e.model.provenance == "assumed" else e.model.name
    options: dict[str, Any] = {"model": model, "optim": [column.spec], "world": e.world_size}
    if e.gpu is not None:
        options["gpu"] = e.gpu
    options |= column.options
    if column.hyper:
        options["hyper"] = [f"{name}={json.dumps(value)}" for name, value in column.hyper.items()]
    if not t.lora and not t.mixed:
        options |= {name: getattr(e, name) for name in ("weights", "gradients") if getattr(e, name) != "mixed"}
    elif e.weights != "mixed":
        options["weights"] = e.weights
    plain = Training()
    for name in _SAID:
        if getattr(t, name) != getattr(plain, name):
            options[name] = getattr(t, name)
    if t.deepspeed:
        options["bucket"] = t.bucket
    if t.seq:
        options |= {name: getattr(t, name) for name in _OF_SEQ}
    return options


def _partition(column: Column) -> str:
    return column.spec.rpartition("/")[2] if "/" in column.spec else ""


def _accelerate(e: Estimate, column: Column) -> str:
    """What ``accelerate launch --config_file`` takes. The weights' own dtype is the precision, unless mixed precision
    was asked for."""
    several, partition = e.world_size > 1, _partition(column)
    kind, more = "MULTI_GPU" if several else "NO", ""
    if e.training.deepspeed:
        kind = "DEEPSPEED"
        more = (
            f"deepspeed_config:\n  deepspeed_config_file: {_DS_CONFIG}  # --emit deepspeed writes it\n"
            f"  zero3_init_flag: {'true' if partition == 'zero3' else 'false'}\n"
        )
    elif several and partition in ("zero2", "zero3"):
        kind = "FSDP"
        more = (
            "fsdp_config:\n  fsdp_version: 2\n"
            f"  fsdp_reshard_after_forward: {'true' if partition == 'zero3' else 'false'}\n"
            "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
            "  fsdp_offload_params: false\n  fsdp_cpu_ram_efficient_loading: false\n"
            f"  fsdp_activation_checkpointing: {'true' if e.training.checkpointing == 'full' else 'false'}\n"
            "  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
        )
    # DeepSpeed's own file says the precision, and accelerate refuses both at once.
    precision = "" if e.training.deepspeed else f"mixed_precision: {e.training.mixed or 'no'!r}\n"
    release = ", then optimizer.release_gradients(model)" if e.training.release_gradients else ""
    # FSDP's own activation checkpointing is that of every layer.
    own = kind == "FSDP" and e.training.checkpointing == "full"
    script = "".join(f"#   {line}\n" for line in ([] if own else _checkpointed(e.training)))
    return (
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: {kind!r}\n"
        f"num_processes: {e.world_size}\n"
        "num_machines: 1\nmachine_rank: 0\n"
        f"{precision}use_cpu: false\n{more}"
        f'# In the script: optimizer = memopt.create(model, "{_script_spec(e, column)}", '
        f"{_keywords(column, '...')}), then accelerator.prepare(model, optimizer){release}.\n"
        + (f"# Before that:\n{script}" if script else "")
    )


def _checkpointed(t: Training) -> list[str]:
    """Lines of Python that turn checkpointing on, on a transformers model, and comments about what else was counted."""
    counted = [f"{name}={getattr(t, name)!r}" for name in _BESIDE if getattr(t, name) != Training._field_defaults[name]]
    before = [f"# counted too, and up to the script: {', '.join(counted)}"] if counted else []
    if t.checkpointing == "none":
        return before
    if t.checkpointing == "full":
        return [*before, "model.gradient_checkpointing_enable()"]
    if t.checkpointing == "selective-2":
        raise InputError("--emit does not write selective-2, which is torchtitan's own policy (selective, op)")
    return [*before, *_partly(t)]


def _partly(t: Training) -> list[str]:
    if t.checkpointing == "selective":
        operators = ", ".join(
            f"aten.{op}.default"
            for op in (
                "mm",
                "addmm",
                "bmm",
                "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_efficient_attention",
            )
        )
        return [
            "aten = torch.ops.aten  # results of these are kept",
            f"keep = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [{operators}])",
            'model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep})',
        ]
    every = t.checkpointing.removeprefix("every-")
    return [f"model.activation_checkpointing_enable(every_n_layers={every})"]


def _script_spec(e: Estimate, column: Column) -> str:
    """What the script gives to ``memopt.create``: DeepSpeed shards and keeps the fp32 copy itself."""
    if not e.training.deepspeed:
        return column.spec
    from memopt.spec import parse

    spec = parse(column.spec)
    placement = "device" if spec.placement in _OFFLOADED else spec.placement  # DeepSpeed offloads
    return str(spec.replace(partition="none", master="none", placement=placement))


def _keywords(column: Column, lr: str = "2e-5", in_dict: bool = False) -> str:
    """The rate, what the placement is told and hyperparameters, as keywords or entries."""
    told = {"lr": lr, **{name: repr(value) for name, value in {**column.options, **column.hyper}.items()}}
    return ", ".join(f'"{k}": {v}' if in_dict else f"{k}={v}" for k, v in told.items())


def _deepspeed(e: Estimate, column: Column) -> dict[str, Any]:
    """:func:`memopt.deepspeed_config`, with the precision and the bucket of the estimate."""
    from estimators.memory.deepspeed import stage
    from memopt.integrations.deepspeed import deepspeed_config
    from memopt.spec import parse

    spec, t = parse(column.spec, hyper=column.hyper), e.training
    stage(spec)  # refuses what the figures refuse
    config = deepspeed_config(
        spec.replace(master="none", placement="device"),
        micro_batch=t.batch,
        accumulate=t.accumulate,
        offload=spec.placement in _OFFLOADED,
        bf16={"enabled": e.weights == "bfloat16"},
        fp16={"enabled": e.weights == "float16"},
    )
    config["zero_optimization"] |= {"reduce_bucket_size": t.bucket, "overlap_comm": False}
    return config


def _script(e: Estimate, column: Column) -> dict[str, str]:
    """What the script says beside a file that cannot hold comments."""
    made = f"memopt.create(model, {_script_spec(e, column)!r}, {_keywords(column, '...')})"
    started = f"deepspeed.initialize(model=model, optimizer={made}, config='{_DS_CONFIG}')"
    return {"script": "\n".join([*_checkpointed(e.training), started])}


def _transformers(e: Estimate, column: Column) -> str:
    """Keywords of TrainingArguments, and the optimizer beside them: ``optim=`` is a closed list there."""
    t = e.training
    if t.release_gradients:
        raise InputError(
            "--emit transformers does not go with --release-gradients: Trainer clips by a norm of all "
            "gradients and steps after them; --emit python does"
        )
    mixed = f"    {t.mixed}=True,\n" if t.mixed else ""
    deepspeed = f'    deepspeed="{_DS_CONFIG}",  # --emit deepspeed writes it\n' if t.deepspeed else ""
    before = [f"# {line}\n" for line in ([] if t.checkpointing == "full" else _checkpointed(t))]
    return (
        "import memopt\nfrom transformers import TrainingArguments\n\n"
        "args = TrainingArguments(\n"
        '    output_dir="out",\n'
        f"    per_device_train_batch_size={t.batch},\n"
        f"    gradient_accumulation_steps={t.accumulate},\n"
        f"    gradient_checkpointing={t.checkpointing == 'full'},\n"
        f"{mixed}{deepspeed})\n"
        f"# {_loading(e)}\n{''.join(before)}"
        f'optimizer = (memopt.Optimizer, {{"spec": "{_script_spec(e, column)}", {_keywords(column, in_dict=True)}}})\n'
        "# trainer = Trainer(model=model, args=args, train_dataset=..., optimizer_cls_and_kwargs=optimizer)\n"
    )


def _python(e: Estimate, column: Column) -> str:
    spec = _script_spec(e, column)
    release = "optimizer.release_gradients(model)\n" if e.training.release_gradients else ""
    shard = after = ""
    if e.training.deepspeed:
        after = f"# then deepspeed.initialize(model=model, optimizer=optimizer, config='{_DS_CONFIG}')\n"
    elif _partition(column) in ("zero2", "zero3"):
        shard = f'memopt.shard(model, "{spec}")\n'
    before = "".join(f"{line}\n" for line in _checkpointed(e.training))
    imports = "import functools\n\nimport torch\n\n" if e.training.checkpointing == "selective" else ""
    made = f'optimizer = memopt.create(model, "{spec}", {_keywords(column)})\n'
    return f"{imports}import memopt\n\n# {_loading(e)}\n{before}{shard}{made}{after}{release}"


def _adapters(t: Training) -> str:
    """What PEFT is told, in words for a comment."""
    if not t.lora:
        return ""
    given: dict[str, Any] = {"r": t.lora}
    names = [name for name in t.lora_targets.replace(",", " ").split() if name]
    if t.lora_targets == "all-linear":
        given["target_modules"] = "all-linear"
    elif t.lora_targets != "default":
        given["target_modules"] = names
    if t.modules_to_save:
        given["modules_to_save"] = t.modules_to_save.replace(",", " ").split()
    if t.lora_dropout:
        given["lora_dropout"] = t.lora_dropout
    if t.lora_kind != "lora":
        given[f"use_{t.lora_kind}"] = True
    prepared = ", then peft.prepare_model_for_kbit_training(model)" if t.kbit else ""
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"{prepared}, then PEFT's LoraConfig({told})"


def _loading(e: Estimate) -> str:
    dtype = "bfloat16" if e.weights == "mixed" else e.weights
    adapters = _adapters(e.training)
    attention = "flash_attention_2" if e.training.attention == "flash" else e.training.attention
    made = _AUTO.get(str((e.model.config or {}).get("model_type")), "AutoModelForCausalLM")
    return f"model = {made}.from_pretrained(..., dtype='{dtype}', attn_implementation='{attention}'){adapters}"
