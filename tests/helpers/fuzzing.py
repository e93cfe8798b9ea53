"""Hostile inputs of every kind that is read, from a seed: well-formed ones, changed where their structure says.

An input is a folder: ``{name: content}``, where content is bytes, or a callable that puts something else there (a link,
a pipe). What is behind a checksum is sealed again, so that readers get past it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import zlib
from collections.abc import Callable
from typing import Any

from memopt.checkpoint.io import manifest
from tests.helpers.fuzzing_corpus import Folder
from tests.helpers.fuzzing_pickles import NUMBERS, TEXTS, VALUES, change_bytes, change_pickle, change_torch

# Changes -----------------------------------------------------------------------------------------------------------


def value(rng: random.Random) -> Any:
    return rng.choice(
        (
            lambda: rng.choice(VALUES),
            lambda: rng.choice(VALUES),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: [],
            lambda: {},
            lambda: [rng.choice(VALUES)] * rng.choice((1, 3, 70)),
            lambda: {rng.choice(TEXTS): rng.choice(VALUES)},
            lambda: {
                rng.choice(("$tensor", "$dict", "$counter", "$tuple", "$float")): rng.choice(
                    (None, [], [[1, 2]], "nan")
                )
            },
            lambda: _deep(rng.choice((10, 100, 900))),
        )
    )()


def _deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


def _place(rng: random.Random, body: Any) -> tuple[Any, Any] | None:
    """A container in a document, and a key of it."""
    here = body
    while isinstance(here, (dict, list)) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        inside = here[key]
        if not isinstance(inside, (dict, list)) or not inside or rng.random() < 0.25:
            return here, key
        here = inside
    return None


def change_document(rng: random.Random, body: Any) -> Any:
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = _place(rng, body)
        if found is None:
            return value(rng)
        here, key = found
        how = rng.randrange(6)
        if how == 0:
            del here[key]
        elif how == 1 and isinstance(here, dict):
            here[rng.choice(TEXTS)] = here.pop(key)
        elif how == 2:
            other = _place(rng, body)
            with contextlib.suppress(RecursionError):
                here[key] = copy.deepcopy(other[0][other[1]]) if other else None
        elif how == 3:
            here[key] = _near(rng, here[key])
        else:
            here[key] = value(rng)
    return body


def _near(rng: random.Random, old: Any) -> Any:
    """A value that could nearly be: what it is the matter with shows late."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice((old - 1, old + 1, 2 * old, -old))
    if isinstance(old, float):
        return rng.choice((old + 1, -old, 0.0))
    if isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), rng.choice(TEXTS)))
    if isinstance(old, list):
        return rng.choice((old[:-1], old[::-1], [*old, *old[:1]]))
    return old


def change_json(rng: random.Random, content: bytes) -> bytes:
    text = json.dumps(change_document(rng, json.loads(content)))
    if rng.random() < 0.05:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def change_manifest(rng: random.Random, content: bytes) -> bytes:
    body = json.loads(content)
    body.pop("sha256", None)
    body = change_document(rng, body)
    try:
        return manifest.dump(body)
    except (ValueError, TypeError):
        return json.dumps(body).encode("utf-8", "surrogatepass")


def change_header(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    try:
        text = change_json(rng, content[8 : 8 + length])
    except ValueError:
        return change_bytes(rng, content)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, 2**31, 2**63, len(text) - 1, len(text) + 1))
    else:
        length = len(text)
    return length.to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def _elsewhere(rng: random.Random) -> Callable[[str], None]:
    return rng.choice(
        (
            lambda path: os.symlink("/etc/passwd", path),
            lambda path: os.symlink("../../secret", path),
            lambda path: os.symlink(os.path.basename(path), path),
            lambda path: os.mkfifo(path),
            lambda path: os.mkdir(path),
        )
    )


def change(rng: random.Random, folder: Folder) -> Folder:
    """The folder with one or two of its files changed, each as its kind says, or replaced by what is no file. Most
    manifests say the checksums of what is there then."""
    changed = dict(folder)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(changed))
        content = changed[name]
        if not isinstance(content, bytes):
            continue
        try:
            if rng.random() < 0.03:
                changed[name] = _elsewhere(rng)
            elif rng.random() < 0.1:
                changed[name] = change_bytes(rng, content)
            else:
                changed[name] = _by_kind(rng, name, content)
        except Exception:  # it was changed before, and is no longer of its kind
            changed[name] = change_bytes(rng, content)
    if "manifest.json" in changed and rng.random() < 0.8:
        _summed(changed)
    return changed


def _summed(folder: Folder) -> None:
    """The manifest has sizes and checksums of the files, where it still has a place for them."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        body = json.loads(folder["manifest.json"])
        body.pop("sha256", None)
        for name in body["files"]:
            content = folder[name]
            if isinstance(content, bytes):
                body["files"][name] = {"nbytes": len(content), "crc32": [f"{zlib.crc32(content):08x}"]}
        folder["manifest.json"] = manifest.dump(body)


def _by_kind(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith("manifest.json"):
        return change_manifest(rng, content)
    if name.endswith(".json"):
        return change_json(rng, content)
    if name.endswith(".safetensors"):
        return change_header(rng, content)
    if name.endswith(".pt"):
        return change_torch(rng, content)
    if name.endswith(".metadata"):
        return change_pickle(rng, content)
    if name.startswith("latest"):
        return rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    if name.endswith(".yaml"):
        lines = content.decode().splitlines()
        lines[rng.randrange(len(lines))] += rng.choice(
            (": ", " &a *a", " !!python/name:os.system", "[" * 99, "\t", "'", "x")
        )
        return "\n".join(lines).replace("ds.json", rng.choice((*TEXTS, "ds.json"))).encode("utf-8", "surrogatepass")
    return change_bytes(rng, content)
