"""``manifest.json``: everything about a checkpoint that is not a tensor, and the checksums of the files that are.

The file is exactly the text that :func:`dump` makes of its content, so any byte that differs shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from memopt.checkpoint.io import manifest_checks
from memopt.checkpoint.io.checkpoint_dir import MANIFEST
from memopt.checkpoint.tensorfile import DamagedFile, FileInfo
from memopt.core.rows import is_narrow
from memopt.untrusted import Refused
from memopt.untrusted.documents import parse_json
from memopt.untrusted.names import within
from memopt.untrusted.opening import read_file
from memopt.untrusted.text import shown

SCHEMA = "memopt.checkpoint/3"
#: Of a checkpoint without second moments in today's code of ``8bit`` (``memopt/formats/int8.py``), which says the same
#: in both: before, it was another one.
OTHER_CODE = "memopt.checkpoint/2"
#: Of one without narrow rows (``memopt/core/rows.py``) either, and of earlier versions, which cut such rows one by one.
EARLIER = "memopt.checkpoint/1"
#: Bytes of a manifest; one of a million parameters has about a tenth.
MAX_NBYTES = 2 * 2**30


def dump(body: dict[str, Any]) -> bytes:
    """The text of a manifest: indented JSON, with the SHA-256 of the same text without ``sha256``."""
    text = _indented(body, "\n")
    digest = hashlib.sha256(text.encode()).hexdigest()
    begin = "{" if text == "{}" else text.removesuffix("\n}") + ","
    return f'{begin}\n "sha256": "{digest}"\n}}\n'.encode()


def _is_as_written(text: bytes) -> bool:
    """Whether the text ends with the SHA-256 of what stands before it."""
    head, _, tail = text.rpartition(b',\n "sha256": "')
    return tail == hashlib.sha256(head + b"\n}").hexdigest().encode() + b'"\n}\n'


def _indented(value: Any, line: str) -> str:
    """``json.dumps(value, indent=1, allow_nan=False)``, which takes four times as long."""
    inner = f"{line} "
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if type(value) is int:
        return str(value)
    if isinstance(value, dict) and value:
        keys = (encode_basestring_ascii(k if isinstance(k, str) else json.dumps(k)) for k in value)
        items = [f"{key}: {_indented(x, inner)}" for key, x in zip(keys, value.values(), strict=True)]
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, (list, tuple)) and value:
        return f"[{inner}{f',{inner}'.join([_indented(x, inner) for x in value])}{line}]"
    return json.dumps(value, allow_nan=False)


def schema_of(body: dict[str, Any]) -> str:
    """The number of what is written: an earlier one where an earlier version reads it."""
    if _in_tapered_codes(body):
        return SCHEMA
    parameters = body.get("optimizer", {}).get("parameters", {}).values()
    return OTHER_CODE if any(is_narrow(tuple(p["shape"])) for p in parameters) else EARLIER


def _in_tapered_codes(body: dict[str, Any]) -> bool:
    parameters = body.get("optimizer", {}).get("parameters", {}).values()
    moments = (moment for entry in parameters for moment in entry.get("moments", {}).values())
    return any(not moment["signed"] and moment["format"] == "8bit" for moment in moments)


def write(directory: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Returns what :func:`read` will."""
    text = dump({"schema": schema_of(body), **body})
    with open(directory / MANIFEST, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written: dict[str, Any] = json.loads(text)
    del written["sha256"]
    return written


def read(directory: Path) -> dict[str, Any]:
    """The content. Raises :class:`DamagedFile` for a manifest that is not, byte for byte, what was written, or whose
    account of the checkpoint cannot be true, and ValueError for one of a schema that this version does not know."""
    path = directory / MANIFEST
    try:
        text = read_file(within(directory, MANIFEST, str(directory)), MAX_NBYTES, "a manifest")
        body = parse_json(text, str(path))
        if not isinstance(body, dict) or "sha256" not in body:
            raise Refused(f"{path} is {shown(body)} without a sha256")
        schema = body.get("schema")
        del body["sha256"]
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    except Refused as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    if schema not in (SCHEMA, OTHER_CODE, EARLIER) and str(schema).startswith("memopt.checkpoint/"):
        raise ValueError(f"{path} has the schema {shown(schema)}; this version of memopt reads {SCHEMA!r}")
    if not _is_as_written(text):
        raise DamagedFile(f"{path} is damaged: it is not what was written (its sha256 does not match)")
    manifest_checks.check(body, str(path))
    if schema != SCHEMA and _in_tapered_codes(body):
        raise ValueError(
            f"{path} has the schema {shown(schema)} and second moments in 8bit, which was another code then: "
            "convert it to 32bit or bf16 with the version that wrote it"
        )
    return body


def file_infos(body: dict[str, Any]) -> dict[str, FileInfo]:
    return {name: FileInfo(info["nbytes"], info["crc32"]) for name, info in body["files"].items()}
