"""Models from files: config.json, a folder that holds one, safetensors headers and their index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import listdir
from os.path import dirname, isdir, isfile, join
from pathlib import Path
from typing import Any

from estimators.errors import InputError, shown
from estimators.models.model import Model
from memopt.untrusted import Refused, documents
from memopt.untrusted.headers import read_header
from memopt.untrusted.names import component, label, within
from memopt.untrusted.opening import open_regular, read_file

#: Files that are no source here, by their ending -> what they are, and what helps.
_NOT_READ = {
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt"), "is a pickle, which is not opened; pass the config.json that lies beside it"
    ),
    ".gguf": "is a GGUF file, which is for inference; pass the config.json of the model that it was made from",
    "model_index.json": "is a pipeline of several models; pass the folder of the one that trains (unet, transformer)",
}
#: The longest configuration or index that is read.
MAX_JSON_NBYTES = 100_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

#: safetensors' names of the dtypes that parameters have -> torch's
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def from_path(path: str) -> Model:
    """The model that a file or folder describes; in a folder config.json before safetensors files."""
    if isdir(path):
        for name in ("config.json", _INDEX, _SINGLE, "model_index.json"):
            if isfile(join(path, name)):
                with refused():
                    return from_path(str(within(Path(path), name, shown(path))))
        others = [name for name in sorted(listdir(path)) if name.endswith(tuple(_NOT_READ))]
        there = f"; {shown(others[0])} {_kind_of(others[0])}" if others else ""
        raise InputError(f"the folder {shown(path)} has none of config.json, {_INDEX}, {_SINGLE}{there}")
    if path.endswith(".safetensors"):
        return from_headers([path], path)
    if path.endswith(tuple(_NOT_READ)):
        raise InputError(f"{shown(path)} {_kind_of(path)}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} holds {_kind(content)}, not a JSON object")
    if isinstance(content.get("weight_map"), dict):
        return from_headers(_shards(path, content["weight_map"]), path)
    from estimators.models.from_config import from_config

    return from_config(content, path)


def _kind_of(path: str) -> str:
    """What a file is that is not read, and what helps."""
    return next(sentence for ending, sentence in _NOT_READ.items() if path.endswith(ending))


def read_json(path: str) -> Any:
    with refused():
        return parse_json(read_file(path, MAX_JSON_NBYTES, "a configuration"), path)


def parse_json(data: bytes, path: str) -> Any:
    with refused():
        return documents.parse_json(data, shown(path))


@contextmanager
def refused() -> Iterator[None]:
    """What is refused of a file is an :class:`InputError` of the calculator's."""
    try:
        yield
    except Refused as error:
        raise InputError(str(error)) from None


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _shards(path: str, weight_map: dict[str, Any]) -> list[str]:
    """The files of an index, which must lie beside it: the index itself has no shapes."""
    for name in weight_map.values():
        with refused():
            component(name, shown(path))
    names = sorted(set(weight_map.values()))
    folder = Path(path).parent
    for name in names:
        with refused():
            found = within(folder, name, path)
        if not found.is_file():
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
        with refused(), open_regular(path) as file:
            header = read_header(file, shown(path))
        for name, entry in header.items():
            if entry.dtype not in _DTYPES:
                raise InputError(
                    f"{shown(path)}: {shown(name)} has the dtype {shown(entry.dtype)}; only weights in "
                    f"{', '.join(_DTYPES)} train"
                )
            with refused():
                shapes.append((label(name, shown(path)), entry.shape))
            if name in dtypes:
                raise InputError(f"{shown(path)}: {shown(name)} is in two files of the model")
            dtypes[name] = _DTYPES[entry.dtype]
    return Model(source, tuple(shapes), "exact", dtypes=dtypes)
