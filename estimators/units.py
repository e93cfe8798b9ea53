"""Numbers with units, read and written. GiB is 2^30 bytes and always spelled."""

from __future__ import annotations

from estimators.errors import MAX_PARAMETERS, InputError, shown

_COUNT = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

#: dtype of weights or gradients, under the names people use -> torch's name
DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
}


def _scaled(text: str, scale: int) -> int | None:
    """A decimal number times ``scale``, exactly, or None where it is not one or does not come out whole."""
    whole, dot, fraction = text.partition(".")
    digits = whole + fraction
    # isdigit alone would let superscripts through, and no figure here has more digits than a 64-bit integer.
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18 or (dot and not fraction):
        return None
    value, rest = divmod(int(digits) * scale, 10 ** len(fraction))
    return None if rest else value


def count(text: str) -> int | None:
    """A parameter count, or None where the text does not look like one. Raises :class:`InputError` out of range.

    >>> count("8B"), count("1.5b"), count("350M"), count("124439808"), count("gpt2")
    (8000000000, 1500000000, 350000000, 124439808, None)
    """
    text = text.strip().replace("_", "")
    scale = _COUNT.get(text[-1:].upper(), 1)
    value = _scaled(text[:-1] if scale > 1 else text, scale)
    return None if value is None else checked_count(value)


def checked_count(value: int) -> int:
    if not 1 <= value <= MAX_PARAMETERS:
        raise InputError(f"{shown(value)} parameters are not allowed; a count is from 1 to 1000T (10^15)")
    return value


def size(text: str) -> int | None:
    """Bytes, or None where the text does not look like a size.

    >>> size("24GiB") == 24 * 2**30, size("80 GB"), size("24")
    (True, 80000000000, None)
    """
    text = text.strip().upper()
    for unit, scale in _SIZE.items():
        if text.endswith(unit):
            return _scaled(text[: -len(unit)].strip(), scale)
    return None


def dtype(text: str, what: str) -> str:
    """torch's name of a dtype."""
    name = DTYPES.get(text.strip().lower()) if isinstance(text, str) else None
    if name is None:
        raise InputError(f"{what}={shown(text)} is not allowed; {what} are bf16, fp32 or fp16")
    return name


def gib(nbytes: int) -> str:
    """Bytes in GiB, to about four digits; in another unit where that would be unreadable.

    >>> gib(2**34), gib(3 * 2**20), gib(2**40 * 3), gib(500), gib(0), gib(2**57)
    ('16.00 GiB', '0.003 GiB', '3,072 GiB', '500 bytes', '0.00 GiB', '131,072 TiB')
    """
    value = nbytes / 2**30
    if value >= 100_000:
        return f"{value / 2**10:,.0f} TiB"
    if 0 < nbytes < 2**20:
        return f"{nbytes:,} bytes" if nbytes < 1000 else f"{nbytes / 2**10:.1f} KiB"
    if value >= 1000:
        return f"{value:,.0f} GiB"
    if value >= 100:
        return f"{value:.1f} GiB"
    return f"{value:.2f} GiB" if value >= 0.1 or not nbytes else f"{value:.3f} GiB"
