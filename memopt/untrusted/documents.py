"""JSON and YAML of people unknown: bounded in depth, without aliases, every key once."""

from __future__ import annotations

import json
from typing import Any

from memopt.untrusted import Refused
from memopt.untrusted.text import printable, shown

#: Levels of lists and objects in each other; configurations have up to eight.
MAX_DEPTH = 64
#: Bytes of a YAML file. Its reader takes some microseconds for a byte; accelerate's own files have about a thousand.
MAX_YAML_NBYTES = 64 * 2**10


def parse_json(data: bytes, origin: str) -> Any:
    """The content of a JSON text. Raises :class:`Refused` for what is none, nested too deeply, or says a key twice (of
    which two readers may believe different ones)."""
    origin = printable(origin)
    refuse_no_text(data, origin, "JSON")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError:
        raise Refused(f"{origin} is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"{origin} is not JSON: {printable(str(error), 100)}") from None
    refuse_depth(value, origin)
    return value


def refuse_no_text(data: bytes, origin: str, language: str) -> None:
    """Raise :class:`Refused` for what is empty and for what is no text: a parser would name a line and a column."""
    if not data.strip():
        raise Refused(f"{origin} is empty")
    try:
        binary = "\0" in data.decode("utf-8-sig")
    except UnicodeDecodeError:
        binary = True
    if binary:
        raise Refused(f"{origin} is not {language}: it is a binary file")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def refuse_depth(value: Any, origin: str) -> None:
    """Raise :class:`Refused` for lists and objects nested deeper than :data:`MAX_DEPTH`; what walks through the rest
    may be recursive."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, (dict, list))
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise Refused(f"{printable(origin)} is nested more than {MAX_DEPTH} levels deep")


def parse_yaml(data: bytes, origin: str) -> Any:
    """The content of a YAML text. Raises :class:`Refused`, and ImportError where PyYAML is not installed."""
    origin = printable(origin)
    if len(data) > MAX_YAML_NBYTES:
        raise Refused(f"{origin} has {len(data):,} bytes; a YAML file that is read has at most {MAX_YAML_NBYTES:,}")
    refuse_no_text(data, origin, "YAML")
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{origin} is read with PyYAML: pip install pyyaml") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Without aliases: a few lines of them stand for more than memory holds."""

        levels = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*name), which is not read")
            self.levels += 1
            if self.levels > MAX_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self.levels -= 1
            return node

    if _most_open(data) > MAX_DEPTH:
        raise Refused(f"{origin} is nested more than {MAX_DEPTH} levels deep")
    try:
        value = yaml.load(data, Loader)
    except Exception as error:  # PyYAML's own, and whatever its constructors run into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refused(f"{origin} is not YAML: {printable(reason, 100)}") from None
    refuse_depth(value, origin)
    return value


def _most_open(data: bytes) -> int:
    """Brackets that are open at once, wherever they stand: PyYAML looks far ahead, and at all of them each time."""
    most = level = 0
    for byte in data:
        if byte in b"[{":
            level += 1
            most = max(most, level)
        elif byte in b"]}":
            level -= 1
    return most
