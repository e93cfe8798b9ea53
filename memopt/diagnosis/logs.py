"""Where readings are written: JSON lines, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from memopt.core.extras import require
from memopt.diagnosis.readings import Finding, Reading


class Log(Protocol):
    def write(self, reading: Reading, findings: Sequence[Finding]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One object to a line, with what was newly found under ``says``. Written through at once."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a")  # noqa: SIM115 - it stays open as long as the watch

    def write(self, reading: Reading, findings: Sequence[Finding]) -> None:
        says = [{"cause": f.cause, "sentence": f.sentence} for f in findings]
        self._file.write(json.dumps({**reading.to_json(), "says": says}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars by group and by moment; sentences as text."""

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", "a log for TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, reading: Reading, findings: Sequence[Finding]) -> None:
        for g in reading.groups:
            for name in ("lr", "estimate", "grad_norm", "update_ratio", "lost", "nonfinite"):
                value = getattr(g, name)
                if value is not None:
                    self._writer.add_scalar(f"memopt/group{g.group}/{name}", value, reading.step)
        for m in reading.moments:
            self._writer.add_scalar(f"memopt/error/{m.parameter}.{m.moment}", m.error, reading.step)
        if reading.loss is not None:
            self._writer.add_scalar("memopt/loss", reading.loss, reading.step)
        for f in findings:
            self._writer.add_text(f"memopt/{f.cause}", f.sentence, reading.step)

    def close(self) -> None:
        self._writer.close()


def open_logs(path: Any, folder: Any) -> list[Log]:
    found: list[Log] = []
    if path is not None:
        found.append(JsonLines(path))
    if folder is not None:
        found.append(TensorBoard(folder))
    return found
