"""What a record of ``@disk`` says: of each parameter after how many steps, where its state is, and its checksums."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

from memopt.core.ledger import ITEMSIZE, Line
from memopt.layout.chunks import PAGE
from memopt.placements.stores.atomic_record import Journal

#: The form of the record; another one is refused.
FORMAT = 2


class Commit(NamedTuple):
    """What a record speaks of: its number, the same on all ranks, and after how many steps each parameter is."""

    number: int
    steps: dict[str, float]


def commit_of(record: bytes) -> Commit | None:
    """None for what is no record."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        body = json.loads(record)
        return Commit(int(body["number"]), {name: float(entry["step"]) for name, entry in body["parameters"].items()})
    return None


def copy_nbytes(entry: dict[str, Any]) -> int:
    sizes = (prod(shape) * ITEMSIZE[dtype] for _, dtype, shape, _ in entry["parts"])
    return sum(-(-nbytes // PAGE) * PAGE for nbytes in sizes)


def line(key: str, dtype: str, shape: list[int]) -> Line:
    moment, _, part = key.partition(".")
    return Line("", moment, part, dtype, tuple(shape), prod(shape) * ITEMSIZE[dtype], "disk")


def shown(parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{key} {dtype} {list(shape)}" for key, dtype, shape in parts[:3])


def refuse_other_world(path: str, rank: str) -> None:
    """Raise RuntimeError for a directory that holds the state of another number of ranks."""
    mine = rank.rpartition("-")[2]
    for name in sorted(os.listdir(path)):
        there = re.fullmatch(r"record-[0-9]{5}-of-([0-9]{5})", name)
        if there is not None and there[1] != mine and _holds_state(os.path.join(path, name)):
            raise RuntimeError(
                f"disk: {path} holds the state of {int(there[1])} ranks, and there are {int(mine)} now; "
                "save and load a checkpoint to change their number"
            )


def _holds_state(path: str) -> bool:
    """Whether a record speaks of any; of one that cannot be read, it is better thought so."""
    journal = Journal(path)
    try:
        records = journal.records()
        return bool(records) and bool(json.loads(records[0])["parameters"])
    except (ValueError, LookupError, TypeError):
        return True
    finally:
        journal.close()
