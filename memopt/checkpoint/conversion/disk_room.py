"""Whether there is room for what a conversion writes. State in row and column means stands for far more numbers than it
has, and a file may say any shape that way."""

from __future__ import annotations

import shutil
from pathlib import Path

from memopt.checkpoint.conversion.converted_source import Converted
from memopt.checkpoint.tensorfile import nbytes_of


def refuse_too_much(converted: Converted, out: Path, *, also: int = 0) -> None:
    """Raise ValueError where the converted state, and ``also`` so many bytes, do not fit the disk of ``out``, or one
    parameter's state does not fit memory. Nothing has been written then."""
    import psutil

    largest, total, sizes = "", also, {"": 0}
    for key, spec in converted.layout().items():
        name = key.rpartition("/")[0]
        sizes[name] = sizes.get(name, 0) + nbytes_of(spec)
        total += nbytes_of(spec)
        largest = max(name, largest, key=lambda one: sizes[one])
    folder = out if out.is_dir() else out.parent
    free = shutil.disk_usage(folder).free if folder.is_dir() else total
    if total > free:
        raise ValueError(f"the converted state has {total:,} bytes, and {free:,} are free in {folder}")
    memory = psutil.virtual_memory().total
    if sizes[largest] > memory:
        raise ValueError(f"the converted state of {largest} has {sizes[largest]:,} bytes, and {memory:,} are in memory")
