"""Models from files: config.json, a folder that holds one, safetensors headers and their index."""

from __future__ import annotations

import json
from os.path import basename, dirname, getsize, isdir, isfile, join
from typing import Any

from estimators.fields import InputError, shown
from estimators.model import Model

#: The longest header that the safetensors format allows.
MAX_JSON_NBYTES = 100_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

#: safetensors' names of the dtypes that parameters have -> torch's
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def from_path(path: str) -> Model:
    """The model that a file or folder describes; in a folder config.json before safetensors files."""
    if isdir(path):
        for name in ("config.json", _INDEX, _SINGLE):
            if isfile(join(path, name)):
                return from_path(join(path, name))
        raise InputError(f"the folder {shown(path)} has none of config.json, {_INDEX}, {_SINGLE}")
    if path.endswith(".safetensors"):
        return from_headers([path], path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} holds {_kind(content)}, not a JSON object")
    if isinstance(content.get("weight_map"), dict):
        return from_headers(_shards(path, content["weight_map"]), path)
    from estimators.config import from_config

    return from_config(content, path)


def read_json(path: str) -> Any:
    if getsize(path) > MAX_JSON_NBYTES:
        raise InputError(f"{shown(path)} has {getsize(path):,} bytes; a configuration has at most {MAX_JSON_NBYTES:,}")
    with open(path, "rb") as file:
        return parse_json(file.read(), path)


def parse_json(data: bytes, path: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{shown(path)} is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise InputError(f"{shown(path)} is not JSON: {str(error)[:100]}") from None


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _shards(path: str, weight_map: dict[str, Any]) -> list[str]:
    """The files of an index, which must lie beside it: the index itself has no shapes."""
    names = sorted({name for name in weight_map.values() if isinstance(name, str)})
    for name in names:
        if name != basename(name) or not isfile(join(dirname(path), name)):
            raise InputError(
                f"{shown(path)} has no shapes of its own and {shown(name)} is not beside it; pass the "
                "model's config.json instead"
            )
    return [join(dirname(path), name) for name in names]


def from_headers(paths: list[str], source: str) -> Model:
    """Names, shapes and dtypes from safetensors headers. Tensors that are buffers count as parameters: the format does
    not tell them apart."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    dtypes: dict[str, str] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name == "__metadata__":
                continue
            shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
                raise InputError(f"{shown(path)}: the entry {shown(name)} has no shape")
            if dtype not in _DTYPES:
                raise InputError(
                    f"{shown(path)}: {shown(name)} has the dtype {shown(dtype)}; only weights in "
                    f"{', '.join(_DTYPES)} train"
                )
            shapes.append((name, tuple(shape)))
            dtypes[name] = _DTYPES[dtype]
    return Model(source, tuple(shapes), "exact", dtypes=dtypes)


def read_header(path: str) -> dict[str, Any]:
    """The JSON header of a safetensors file: eight bytes of length, then text."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_JSON_NBYTES, getsize(path)):
            raise InputError(f"{shown(path)} is not a safetensors file: its header would have {length:,} bytes")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise InputError(f"{shown(path)} is not a safetensors file: its header is {_kind(header)}")
    return header
