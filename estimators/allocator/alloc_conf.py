"""Settings of torch's CUDA caching allocator: the environment variable ``PYTORCH_ALLOC_CONF``."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

from estimators.errors import InputError, shown

MIB = 2**20
LARGE_SEGMENT = 20 * MIB
#: Where blocks of every size may be split.
NEVER = 2**62


class Settings(NamedTuple):
    """``PYTORCH_ALLOC_CONF``. ``max_split``: blocks from so many bytes on are not split. ``oversize``: by how much a
    block that is not split may be larger than what is asked. ``divisions``: requests are rounded up to one of so many
    steps between powers of two (0: to 512 bytes). ``threshold``: share of ``limit`` from which unused segments are
    given back first (0: never). ``limit``: bytes that may be reserved (0: no limit)."""

    expandable: bool = False
    max_split: int = NEVER
    oversize: int = LARGE_SEGMENT
    divisions: int = 0
    threshold: float = 0.0
    limit: int = 0


def parsed(text: str, limit: int = 0) -> Settings:
    """Settings from the text of the environment variable. Raises :class:`InputError`.

    >>> parsed("expandable_segments:True").expandable
    True
    """
    found = Settings(limit=limit)
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition(":"))
        try:
            if name == "expandable_segments" and value in ("True", "False"):
                found = found._replace(expandable=value == "True")
            elif name == "max_split_size_mb" and int(value) > LARGE_SEGMENT // MIB:
                found = found._replace(max_split=int(value) * MIB)
            elif name == "max_non_split_rounding_mb" and int(value) > LARGE_SEGMENT // MIB:
                found = found._replace(oversize=int(value) * MIB)
            elif name == "roundup_power2_divisions" and int(value) & (int(value) - 1) == 0 < int(value):
                found = found._replace(divisions=int(value))
            elif name == "garbage_collection_threshold" and 0 < float(value) < 1:
                found = found._replace(threshold=float(value))
            else:
                raise ValueError
        except ValueError:
            raise InputError(
                f"the allocator's setting {shown(part)} is not allowed; known are expandable_segments:True|False, "
                "max_split_size_mb:N and max_non_split_rounding_mb:N (N over 20), roundup_power2_divisions:N (a power "
                "of two) and garbage_collection_threshold:F (between 0 and 1)"
            ) from None
    return found


#: torch's own.
DEFAULT = Settings()
