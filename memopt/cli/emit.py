"""``--emit`` and ``--from``: the chosen row as a configuration that can be launched, and back to the same figures.

Every file that is emitted begins with a comment that holds the options of ``memopt estimate``; that line, and nothing
else in the file, is what ``--from`` reads. A DeepSpeed configuration, which cannot hold comments, is read by its keys.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from estimators.costs import Column, Estimate
from estimators.fields import InputError, shown

KINDS = ("accelerate", "transformers", "python")
_MARK = "# memopt estimate: "
#: Options that are numbers on the command line and text in a Namespace.
_NUMBERS = ("seq", "batch", "accumulate", "lora", "world")
_OPTIONS = ("model", "optim", "gpu", "weights", "gradients", "checkpointing", "attention", "quantised",
            "release_gradients", *_NUMBERS)  # fmt: skip


def chosen(e: Estimate) -> Column:
    """The first spec that fits, or the first."""
    return next((c for c in e.columns if e.gpu is not None and not c.over(e.gpu)), e.columns[0])


def emit(kind: str, e: Estimate) -> str:
    if kind not in KINDS:
        raise InputError(f"--emit {shown(kind)} is not allowed; it is one of {', '.join(KINDS)}")
    column = chosen(e)
    body = {"accelerate": _accelerate, "transformers": _transformers, "python": _python}[kind](e, column)
    return f"{_MARK}{json.dumps(_options(e, column))}\n{body}"


def _options(e: Estimate, column: Column) -> dict[str, Any]:
    t = e.training
    model = str(e.parameters) if e.model.provenance == "assumed" else e.model.name
    options: dict[str, Any] = {"model": model, "optim": [column.spec], "world": e.world_size}
    if e.gpu is not None:
        options["gpu"] = e.gpu
    for name in ("weights", "gradients"):
        if getattr(e, name) != "mixed":
            options[name] = getattr(e, name)
    if t.lora:
        options = {k: v for k, v in options.items() if k not in ("weights", "gradients")} | {"lora": t.lora}
    if t.quantised:
        options["quantised"] = t.quantised
    if t.release_gradients:
        options["release_gradients"] = True
    if t.seq:
        options |= {"seq": t.seq, "batch": t.batch, "accumulate": t.accumulate, "checkpointing": t.checkpointing,
                    "attention": t.attention}  # fmt: skip
    return options


def _accelerate(e: Estimate, column: Column) -> str:
    """What ``accelerate launch --config_file`` takes. The weights' own dtype is the precision: no autocast."""
    several = e.world_size > 1
    release = ", then optimizer.release_gradients(model)" if e.training.release_gradients else ""
    return (
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: {'MULTI_GPU' if several else 'NO'!r}\n"
        f"num_processes: {e.world_size}\n"
        "num_machines: 1\nmachine_rank: 0\n"
        "mixed_precision: 'no'\nuse_cpu: false\n"
        "# In the script: optimizer = memopt.create(model, "
        f'"{column.spec}", lr=...), then accelerator.prepare(model, optimizer){release}.\n'
    )


def _transformers(e: Estimate, column: Column) -> str:
    """Keywords of TrainingArguments, and the optimizer beside them: ``optim=`` is a closed list there."""
    t = e.training
    if t.release_gradients:
        raise InputError("--emit transformers does not go with --release-gradients: Trainer clips by a norm of all "
                         "gradients and steps after them; --emit python does")  # fmt: skip
    return (
        "import memopt\nfrom transformers import TrainingArguments\n\n"
        "args = TrainingArguments(\n"
        '    output_dir="out",\n'
        f"    per_device_train_batch_size={t.batch},\n"
        f"    gradient_accumulation_steps={t.accumulate},\n"
        f"    gradient_checkpointing={t.checkpointing == 'full'},\n"
        ")\n"
        f"# {_loading(e)}\n"
        f'optimizer = (memopt.Optimizer, {{"spec": "{column.spec}", "lr": 2e-5}})\n'
        "# trainer = Trainer(model=model, args=args, train_dataset=..., optimizer_cls_and_kwargs=optimizer)\n"
    )


def _python(e: Estimate, column: Column) -> str:
    release = "optimizer.release_gradients(model)\n" if e.training.release_gradients else ""
    return f'import memopt\n\n# {_loading(e)}\noptimizer = memopt.create(model, "{column.spec}", lr=2e-5)\n{release}'


def _loading(e: Estimate) -> str:
    dtype = "bfloat16" if e.weights == "mixed" else e.weights
    adapters = f", then PEFT's LoraConfig(r={e.training.lora}, target_modules='all-linear')" if e.training.lora else ""
    given = f"dtype='{dtype}', attn_implementation='{e.training.attention}'"
    return f"model = AutoModelForCausalLM.from_pretrained(..., {given}){adapters}"


def read_into(args: Namespace, path: str) -> None:
    """Set the options that a file says and the command line does not. Raises :class:`InputError`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(1_000_000)
    line = next((part for part in text.splitlines() if part.startswith(_MARK)), None)
    if line is not None:
        options = _object(line.removeprefix(_MARK), path)
    elif text.lstrip().startswith("{"):
        options = _deepspeed(_object(text, path), path)
    else:
        raise InputError(f"{shown(path)} is neither what --emit wrote nor a DeepSpeed configuration")
    for name in _OPTIONS:
        value = options.get(name)
        given = getattr(args, name)
        if value is None or (given is not None and not (name == "world" and given == "1")):
            continue
        if name == "optim":
            value = value if isinstance(value, list) and all(isinstance(v, str) for v in value) else [str(value)]
        elif name in _NUMBERS:
            value = str(value)
        setattr(args, name, value)
    if args.model is None:
        raise InputError(f"which model? {shown(path)} does not say")


def _object(text: str, path: str) -> dict[str, Any]:
    from estimators.files import parse_json

    value = parse_json(text.encode(), path)
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)} holds no JSON object")
    return value


def _deepspeed(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration that change memory. Stages 2 and 3 shard what the calculator's specs
    cannot say yet."""
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage not in (0, 1):
        raise InputError(f"{shown(path)}: ZeRO stage {shown(stage)} has no spec yet; stages 0 and 1 have")
    optimizer = config.get("optimizer")
    kind = str(optimizer.get("type", "AdamW")) if isinstance(optimizer, dict) else "AdamW"
    rule = {"adam": "adam", "adamw": "adamw", "lion": "lion"}.get(kind.lower())
    if rule is None:
        raise InputError(f"{shown(path)}: the optimizer {shown(kind)} has no spec; Adam, AdamW and Lion have")
    options: dict[str, Any] = {"optim": [rule + ("/zero1" if stage else "")]}
    for theirs, ours in (("train_micro_batch_size_per_gpu", "batch"), ("gradient_accumulation_steps", "accumulate")):
        if isinstance(config.get(theirs), int):
            options[ours] = config[theirs]
    return options
