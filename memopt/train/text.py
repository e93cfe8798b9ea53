"""Real text as bytes: where it comes from, how it is split, and which batch belongs to which step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.core.dither import key

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens are bytes.
VOCABULARY = 256
#: The last tenth of the text is for validation.
TRAIN_TENTHS = 9
#: At most this many validation windows, evenly spaced.
VALIDATION_WINDOWS = 256


@dataclass(frozen=True)
class Text:
    """A text, and a name for it that a person recognises."""

    name: str
    content: bytes

    @property
    def train(self) -> bytes:
        return self.content[: len(self.content) * TRAIN_TENTHS // 10]

    @property
    def validation(self) -> bytes:
        return self.content[len(self.content) * TRAIN_TENTHS // 10 :]

    @property
    def entropy(self) -> float:
        """Nats per byte of the frequencies of single bytes: what a model without context can reach.

        >>> round(Text("two letters", b"abab").entropy, 3)
        0.693
        """
        n = len(self.content)
        return -sum(count / n * log(count / n) for count in Counter(self.content).values())

    def check(self, context: int) -> None:
        """Raise ValueError where a part of the split cannot hold one window of ``context`` bytes and the next byte."""
        if not self.content.strip():
            raise ValueError(f"{self.name} holds no text")
        if len(self.validation) <= context:
            raise ValueError(
                f"{self.name} has {len(self.content):,} bytes; a context of {context} needs at least "
                f"{context * 10 + 1:,}, because the last tenth is kept for validation"
            )


def load_text(path: str | None = None) -> Text:
    """The text of a file, of every text file under a folder, or, without a path, Python's language reference.

    In a folder, hidden files and folders and files with a NUL byte are left out, and the order is that of the paths.
    Raises FileNotFoundError for a path that does not exist and ValueError where there is no text.
    """
    if path is None:
        return _language_reference()
    source = Path(path)
    if source.is_file():
        content = source.read_bytes()
        if b"\0" in content:
            raise ValueError(f"{path} is a binary file, not text: it has a NUL byte")
        return Text(path, content)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path!r}")
    files = (f for f in sorted(source.rglob("*")) if f.is_file() and not _hidden(f.relative_to(source)))
    parts = [content for content in (f.read_bytes() for f in files) if b"\0" not in content]
    return Text(path, b"\n".join(parts))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _language_reference() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python was installed without pydoc_data, its language reference; name a text file or a folder"
        ) from error
    return Text("Python's language reference", "\n".join(topics[name] for name in sorted(topics)).encode())


class Corpus:
    """A text as tensors of bytes."""

    def __init__(self, text: Text, context: int) -> None:
        import torch

        text.check(context)
        self.context = context
        self.train = torch.frombuffer(bytearray(text.train), dtype=torch.uint8)  # [bytes]
        self.validation = torch.frombuffer(bytearray(text.validation), dtype=torch.uint8)  # [bytes]

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Random windows, int64 [size, context + 1]: a function of the text, the seed, the step and the size."""
        import torch

        generator = torch.Generator().manual_seed(key(seed, step))
        starts = torch.randint(len(self.train) - self.context, (size,), generator=generator)
        return self._windows(self.train, starts)

    def validation_windows(self) -> Tensor:
        """The same windows in every run, int64 [windows, context + 1]; neighbours share one byte at most."""
        import torch

        count = min((len(self.validation) - 1) // self.context, VALIDATION_WINDOWS)
        last = len(self.validation) - self.context - 1
        return self._windows(self.validation, torch.arange(count) * last // max(count - 1, 1))

    def _windows(self, data: Tensor, starts: Tensor) -> Tensor:
        import torch

        return data[starts[:, None] + torch.arange(self.context + 1)].long()
