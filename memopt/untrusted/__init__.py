"""Reading what strangers wrote: checkpoints, configurations and headers from elsewhere.

Every reader of the package goes through these modules, so that each promise of SECURITY.md is kept in one place:

- :mod:`~memopt.untrusted.names`: a name in a file is a component of a path or it is refused;
- :mod:`~memopt.untrusted.text`: text from a file is shown without control characters, and short;
- :mod:`~memopt.untrusted.opening`: regular files only, their size known before they are read;
- :mod:`~memopt.untrusted.documents`: JSON and YAML of bounded depth, without aliases and duplicates;
- :mod:`~memopt.untrusted.headers`: safetensors headers, every byte of the file accounted for;
- :mod:`~memopt.untrusted.pickles`: pickles as trees of plain values, in time and memory linear in their size;
- :mod:`~memopt.untrusted.torchfiles`: what ``torch.save`` wrote, mapped, without its unpickler.

All but the last are torch-free. What is refused is a :class:`Refused`, a ValueError of one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memopt.untrusted.text import printable


class Refused(ValueError):
    """Something in a file that is not read; the message names the file and what is wrong with it."""


@contextmanager
def laid_out(origin: str, what: str) -> Iterator[None]:
    """What goes wrong within, because values of the file ``origin`` are of other kinds than ``what`` has, is a
    :class:`Refused` that says so; the first error is its cause."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {printable(str(error), 100)}"
        raise Refused(f"{origin} is damaged, or not laid out as {what} is known here ({reason})") from error
