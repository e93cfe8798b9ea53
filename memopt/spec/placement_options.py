"""Placement options: keyword arguments of ``memopt.create`` and ``memopt.price``, and their validation."""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from memopt.core.hyperparameters import SpecError

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(value: Any, what: str) -> int:
    """Bytes of a number or of a size such as ``"12GiB"``. Raises SpecError.

    >>> size("1.5KiB", "limit")
    1536
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = value.strip().upper() if isinstance(value, str) else ""
    for unit, scale in _UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit() and number.isascii() and len(number) <= 18:
            return int(float(number) * scale)
    raise SpecError(f"{what}={value!r} is not allowed; it is a number of bytes or a size such as '12GiB'")


def _positive_size(value: Any, what: str) -> int:
    nbytes = size(value, what)
    if nbytes < MIN_SIZE:
        raise SpecError(f"{what}={value!r} is not allowed; it is at least {MIN_SIZE:,} bytes")
    return nbytes


def _path(value: Any, what: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise SpecError(f"{what}={value!r} is not allowed; it is the path of a directory")
    return os.path.abspath(os.fsdecode(os.fspath(value)))


def _gradients(value: Any, what: str) -> Any:
    if not isinstance(value, bool) and value != PREFETCH:
        raise SpecError(f"{what}={value!r} is not allowed; it is True, False or {PREFETCH!r}")
    return value


#: Gradients are copied to the host as they become ready, and stay on the device.
PREFETCH = "early"
#: Partitions whose gradients are what the step sees when they are ready in ``backward()``.
_OFFLOADED = ("none", "zero2", "zero3")
#: The smallest workspace or limit that can be asked for.
MIN_SIZE = 2**20
#: Host or device memory that state is streamed through, unless it is said.
WORKSPACE = 256 * 2**20


class Option(NamedTuple):
    """``placements`` have it; ``check(value, name)`` returns the value as it is kept."""

    placements: tuple[str, ...]
    default: Any
    check: Callable[[Any, str], Any]
    summary: str


OPTIONS: dict[str, Option] = {
    "directory": Option(("disk",), None, _path, "where the files are; they survive the process"),
    "workspace": Option(("host", "cpu", "disk"), WORKSPACE, _positive_size, "bytes that state is streamed through"),
    "resident": Option(("paged",), None, _positive_size, "bytes of state that stay in memory after a step"),
    "offload_gradients": Option(("cpu",), False, _gradients, "whether gradients go to the host in backward()"),
}


def checked(given: Mapping[str, Any], placements: Iterable[str], partition: str) -> dict[str, Any]:
    """The options as they are kept. Raises SpecError for one that none of these placements has."""
    in_use = set(placements)
    checked = {}
    for name, value in given.items():
        if name not in OPTIONS:
            raise SpecError(f"unknown option {name!r}; the options of placements are {', '.join(OPTIONS)}")
        option = OPTIONS[name]
        if not in_use & set(option.placements):
            wanted = " or ".join(f"@{p}" for p in option.placements)
            raise SpecError(f"{name}={value!r} is for {wanted}; this spec is @{', @'.join(sorted(in_use))}")
        checked[name] = option.check(value, name)
    if checked.get("offload_gradients") and partition not in _OFFLOADED:
        raise SpecError(
            f"offload_gradients={checked['offload_gradients']!r} is not for /{partition}: "
            "DistributedDataParallel keeps room for all gradients in its buckets on the device, which would not "
            "become free; shard them, '/zero2' or '/zero3', and each shard leaves when it is reduced, or leave it out "
            "and give DistributedDataParallel gradient_as_bucket_view=True: then gradients are in these buckets alone"
        )
    return checked


def of_placement(given: Mapping[str, Any], placement: str) -> dict[str, Any]:
    """Every option of one placement, given or default."""
    return {name: given.get(name, o.default) for name, o in OPTIONS.items() if placement in o.placements}
