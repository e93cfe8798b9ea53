"""The folder of a PEFT adapter: its base model, and what its configuration says about the adapters."""

from __future__ import annotations

from os.path import join
from typing import Any

from estimators.errors import InputError, shown

FILE = "adapter_config.json"


def dropout(module: Any, given: float) -> float:
    """The adapters' dropout of a module that PEFT wrapped, unless another is given."""
    configs = module.peft_config.values() if isinstance(module.peft_config, dict) else ()
    found = [p for p in (getattr(c, "lora_dropout", 0.0) for c in configs) if isinstance(p, float) and 0 <= p < 1]
    return given or max(found, default=0.0)


def read(folder: str) -> tuple[str, dict[str, Any]]:
    """The base model's name and keywords of :func:`estimators.estimate`. Raises :class:`InputError`."""
    from estimators.models.from_files import read_json

    path = join(folder, FILE)
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} holds no JSON object")
    kind, base, rank = content.get("peft_type"), content.get("base_model_name_or_path"), content.get("r")
    if kind != "LORA":
        raise InputError(f"{shown(path)}: peft_type={shown(kind)} is not known; the calculator knows LORA")
    if not isinstance(base, str) or not base:
        raise InputError(f"{shown(path)} does not say which model it adapts (base_model_name_or_path)")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{shown(path)}: r={shown(rank)} is not allowed; it is a whole number from 1 on")
    if content.get("rank_pattern") or content.get("layers_to_transform"):
        raise InputError(f"{shown(path)}: rank_pattern and layers_to_transform are not known to the calculator")
    kinds = {"dora": content.get("use_dora"), "rslora": content.get("use_rslora")}
    dropout = content.get("lora_dropout", 0.0)
    return base, {
        "lora": rank,
        "lora_targets": _names(content.get("target_modules"), "default", "target_modules", path),
        "modules_to_save": _names(content.get("modules_to_save"), "", "modules_to_save", path),
        "lora_dropout": dropout if isinstance(dropout, float) and dropout < 1 else 0.0,
        "lora_kind": next((name for name, on in kinds.items() if on), "lora"),
    }


def _names(value: Any, default: str, field: str, path: str) -> str:
    if not value:
        return default
    if isinstance(value, str):
        if value != "all-linear":
            raise InputError(f"{shown(path)}: {field}={shown(value)} is a regular expression, which is not known")
        return value
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{shown(path)}: {field}={shown(value)} is not allowed; it is a list of names")
    return ",".join(value)
