"""``--from``: the options of ``memopt estimate`` that a launch configuration implies.

What ``--emit`` wrote says them itself. Of other people's files the keys that change memory are read: a DeepSpeed
configuration (JSON), and the YAML of ``accelerate config`` (DistributedDataParallel, FSDP, DeepSpeed). A key whose
effect is not known to the calculator is refused rather than left out.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estimators.errors import InputError, shown
from estimators.models.from_files import refused
from memopt.cli.flags import placement, step
from memopt.cli.output.emit import MARK
from memopt.untrusted.documents import parse_yaml
from memopt.untrusted.names import within
from memopt.untrusted.opening import read_file

#: Options that are numbers on the command line and text in a Namespace.
_NUMBERS = ("seq", "world", *(flag.name for flag in step.FLAGS if flag.kind in ("number", "share")))
_OPTIONS = (
    "model",
    "optim",
    "gpu",
    "weights",
    "gradients",
    "hyper",
    *(flag.name for flag in step.FLAGS if flag.name not in _NUMBERS),
    *placement.FLAGS,
    *_NUMBERS,
)
_MOST = 1_000_000
_RULES = {"adam": "adam", "adamw": "adamw", "lion": "lion", "sgd": "sgd"}
_PLACES = {"none": "", "cpu": "@cpu", "nvme": "@disk"}
#: FSDP's older words for whether gathered weights are given up after the forward pass.
_STRATEGIES = {
    "FULL_SHARD": "zero3",
    "SHARD_GRAD_OP": "zero2",
    "NO_SHARD": "",
    "TRUE": "zero3",
    "FALSE": "zero2",
    "1": "zero3",
    "2": "zero2",
    "3": "",
}


def read_into(args: Namespace, path: str) -> None:
    """Set the options that a file says and the command line does not. Raises :class:`InputError`."""
    options = read(path)
    for name in _OPTIONS:
        value = options.get(name)
        given = getattr(args, name)
        if value is None or (given is not None and not (name == "world" and given == "1")):
            continue
        if name in ("optim", "hyper"):
            value = value if isinstance(value, list) and all(isinstance(v, str) for v in value) else [str(value)]
        elif name in _NUMBERS:
            value = str(value)
        elif not isinstance(value, (str, int)):
            raise InputError(f"{shown(path)}: {name}={shown(value)} is not allowed; it is text or a number")
        setattr(args, name, value)
    if args.model is None:
        raise InputError(f"which model? {shown(path)} does not say")


def read(path: str) -> dict[str, Any]:
    """Options by name."""
    data = _content(path)
    text = data.decode("utf-8", errors="replace")
    line = next((part for part in text.splitlines() if part.startswith(MARK)), None)
    if line is not None:
        return _object(line.removeprefix(MARK), path)
    if text.lstrip().startswith("{"):
        return deepspeed(_object(text, path), path)
    content = _yaml(data, path)
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise InputError(f"{shown(path)} is neither what --emit wrote, nor a DeepSpeed configuration, nor accelerate's")
    return accelerate(content, path)


def _object(text: str, path: str) -> dict[str, Any]:
    from estimators.models.from_files import parse_json

    value = parse_json(text.encode(), path)
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)} holds no JSON object")
    return value


def _content(path: str) -> bytes:
    with refused():
        return read_file(path, _MOST, "a launch configuration")


def _yaml(data: bytes, path: str) -> Any:
    try:
        with refused():
            return parse_yaml(data, shown(path))
    except ImportError as error:
        raise InputError(str(error)) from None


def _section(config: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    """A part of a configuration; empty where there is none."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: {name}={shown(value)} is not allowed; it is an object")
    return value


def _choice(value: Any, allowed: Mapping[str, str], what: str, path: str) -> str:
    text = str(value).rpartition(".")[2]
    for key in (text, text.lower(), text.upper()):
        if key in allowed:
            return allowed[key]
    raise InputError(
        f"{shown(path)}: {what}={shown(value)} is not known to the calculator; it knows {', '.join(allowed)}"
    )


def _number(value: Any, what: str, path: str) -> int | None:
    """A whole number (DeepSpeed's 5e8 too); None for what is left to others (``auto``)."""
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 10**12 or value % 1:
        raise InputError(f"{shown(path)}: {what}={shown(value)} is not allowed; it is a whole number >= 1")
    return int(value)


def _on(config: Mapping[str, Any], name: str, path: str) -> bool:
    value = config.get(name, False)
    if value in (True, "true", "True"):
        return True
    if value in (None, False, "false", "False", "auto", "none"):
        return False
    raise InputError(f"{shown(path)}: {name}={shown(value)} is not allowed; it is true or false")


# DeepSpeed -----------------------------------------------------------------------------------------------------


def deepspeed(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration that change memory."""
    own = config.get("memopt")
    if isinstance(own, dict) and isinstance(own.get("estimate"), dict):
        return dict(own["estimate"])
    zero = _section(config, "zero_optimization", path)
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (0, 1, 2, 3):
        raise InputError(f"{shown(path)}: ZeRO stage {shown(stage)} is not allowed; it is 0, 1, 2 or 3")
    _refuse(config, zero, path)
    kind = _section(config, "optimizer", path).get("type", "AdamW")
    place = _choice(
        _section(zero, "offload_optimizer", path).get("device", "none"), _PLACES, "offload_optimizer.device", path
    )
    options: dict[str, Any] = {
        "deepspeed": True,
        "optim": [_choice(kind, _RULES, "optimizer.type", path) + place + (f"/zero{stage}" if stage else "")],
        "weights": _precision(config, path),
    }
    bucket = _number(zero.get("reduce_bucket_size"), "reduce_bucket_size", path)
    if _on(zero, "overlap_comm", path) and stage in (1, 2):  # two buckets by turns; stage 3 keeps one
        from estimators.training import BUCKET

        bucket = 2 * (bucket or BUCKET)
    options["bucket"] = bucket
    return options | _batch(config, path)


def _refuse(config: Mapping[str, Any], zero: Mapping[str, Any], path: str) -> None:
    """What moves or shrinks bytes in ways the calculator does not know."""
    place = _section(zero, "offload_param", path).get("device", "none")
    unknown = {"offload_param": place not in ("none", None)}
    unknown |= {name: _on(zero, name, path) for name in ("zero_quantized_weights", "zero_quantized_gradients")}
    for section, name in (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads")):
        unknown[name] = _on(_section(config, section, path), name, path)
    for name, given in unknown.items():
        if given:
            raise InputError(f"{shown(path)}: {name} is set, and what it does to memory is not known to the calculator")


def _precision(config: Mapping[str, Any], path: str) -> str:
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _on(_section(config, section, path), "enabled", path):
            return dtype
    return "float32"


def _batch(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Micro-batch, accumulation and ranks, of which DeepSpeed derives one from the product of all three."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulate = (_number(config.get(key), key, path) for key in keys)
    options: dict[str, Any] = {"batch": micro, "accumulate": accumulate}
    if total and micro:
        ranks, rest = divmod(total, micro * (accumulate or 1))
        if rest or not ranks:
            raise InputError(
                f"{shown(path)}: train_batch_size={total} is not a multiple of {micro} x {accumulate or 1}"
            )
        options["world"] = ranks
    return options


# accelerate ----------------------------------------------------------------------------------------------------


def accelerate(config: dict[str, Any], path: str) -> dict[str, Any]:
    """What ``accelerate config`` asks about memory. The optimizer is the script's: AdamW, until ``--optim`` says
    otherwise."""
    kind = str(config.get("distributed_type")).rpartition(".")[2].upper()
    options: dict[str, Any] = {"world": _number(config.get("num_processes", 1), "num_processes", path)}
    precision = str(config.get("mixed_precision") or "no").rpartition(".")[2].lower()
    if precision not in ("no", "false", "bf16", "fp16"):
        raise InputError(
            f"{shown(path)}: mixed_precision={shown(precision)} is not known to the calculator; it knows no, bf16, fp16"
        )
    mixed = precision if precision in ("bf16", "fp16") else None
    if kind in ("DEEPSPEED", "DISTRIBUTEDTYPE.DEEPSPEED"):
        return options | deepspeed(*_accelerated_deepspeed(_section(config, "deepspeed_config", path), mixed, path))
    if kind not in ("NO", "FALSE", "MULTI_GPU", "FSDP"):
        raise InputError(
            f"{shown(path)}: distributed_type={shown(kind)} is not known to the calculator; it knows NO, "
            "MULTI_GPU, FSDP, DEEPSPEED"
        )
    options |= {"optim": ["adamw"], "mixed": mixed}
    return options | (_fsdp(_section(config, "fsdp_config", path), path) if kind == "FSDP" else {})


def _fsdp(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    if _on(config, "fsdp_offload_params", path):
        raise InputError(
            f"{shown(path)}: fsdp_offload_params is set, and weights on the host are not known to the calculator"
        )
    how = config.get("fsdp_sharding_strategy", config.get("fsdp_reshard_after_forward", True))
    partition = _choice(how, _STRATEGIES, "fsdp_reshard_after_forward", path)
    options: dict[str, Any] = {"optim": [f"adamw/{partition}" if partition else "adamw"]}
    if _on(config, "fsdp_activation_checkpointing", path):
        options["checkpointing"] = "full"
    return options


def _accelerated_deepspeed(section: Mapping[str, Any], mixed: str | None, path: str) -> tuple[dict[str, Any], str]:
    """DeepSpeed's own file where there is one, or accelerate's few fields; and which file says so."""
    file = section.get("deepspeed_config_file")
    if isinstance(file, str) and file != "none":
        with refused():
            beside = str(within(Path(path).parent, file, f"deepspeed_config_file in {shown(path)}"))
        return _object(_content(beside).decode("utf-8", errors="replace"), beside), beside
    config = {
        "zero_optimization": {
            "stage": section.get("zero_stage", 2),
            "offload_optimizer": {"device": section.get("offload_optimizer_device") or "none"},
            "offload_param": {"device": section.get("offload_param_device") or "none"},
        },
        "gradient_accumulation_steps": section.get("gradient_accumulation_steps"),
        **({mixed: {"enabled": True}} if mixed else {}),
    }
    return config, path


def deepspeed_configuration(path: str) -> dict[str, Any]:
    """The DeepSpeed configuration in a file, or that accelerate's YAML names or implies. Raises :class:`InputError`."""
    data = _content(path)
    text = data.decode("utf-8", errors="replace")
    if text.lstrip().startswith("{"):
        return _object(text, path)
    content = _yaml(data, path)
    if not isinstance(content, dict) or "deepspeed_config" not in content:
        raise InputError(f"{shown(path)} is neither a DeepSpeed configuration nor accelerate's with one")
    return _accelerated_deepspeed(_section(content, "deepspeed_config", path), None, path)[0]
