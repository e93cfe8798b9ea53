"""``manifest.json``: everything about a checkpoint that is not a tensor, and the checksums of the files that are.

The file is exactly the text that :func:`dump` makes of its content, so any byte that differs shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from memopt.checkpoint.folder import MANIFEST
from memopt.checkpoint.tensorfile import DamagedFile, FileInfo

SCHEMA = "memopt.checkpoint/1"


def dump(body: dict[str, Any]) -> bytes:
    """The text of a manifest: indented JSON, with the SHA-256 of the same text without ``sha256``."""
    text = json.dumps(body, indent=1, allow_nan=False)
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode() + b"\n"


def write(directory: Path, body: dict[str, Any]) -> None:
    with open(directory / MANIFEST, "wb") as file:
        file.write(dump({"schema": SCHEMA, **body}))
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict[str, Any]:
    """The content. Raises :class:`DamagedFile` for a manifest that is not, byte for byte, what was written, and
    ValueError for one of a schema that this version does not know."""
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
        body = json.loads(text)
        schema = body["schema"]
        del body["sha256"]
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    if schema != SCHEMA and str(schema).startswith("memopt.checkpoint/"):
        raise ValueError(f"{path} has the schema {schema!r}; this version of memopt reads {SCHEMA!r}")
    if dump(body) != text:
        raise DamagedFile(f"{path} is damaged: it is not what was written (its sha256 does not match)")
    return body


def file_infos(body: dict[str, Any]) -> dict[str, FileInfo]:
    return {name: FileInfo(info["nbytes"], info["crc32"]) for name, info in body["files"].items()}
