"""What it takes to give another tool its state."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from memopt.checkpoint.conversion.compatibility import Fill
from memopt.checkpoint.conversion.converted_source import Converted, Zeros, in_memory
from memopt.checkpoint.conversion.param_state import OURS, Encoding
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.state.moment_codes import CODES, MomentCodes
from memopt.checkpoint.state.saved import Record, Source
from memopt.checkpoint.tensorfile import Progress
from memopt.core.rows import Shape
from memopt.formats.foreign.flat_blocks import FlatBlocks
from memopt.rules import RULES
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.checkpoint.opened import Checkpoint

ToolDict = dict[str, Any]


class ExportPlan(NamedTuple):
    """``spec`` and ``encoding`` are what the tool can hold; ``group(hyper)`` and ``state(record, parts)`` make its
    dictionaries of ours (no ``state`` where an optimizer has no dictionary of its own); ``check(converted)`` raises
    ValueError where what would be written cannot be; ``complete(found, converted)`` has the last word on the whole."""

    spec: OptimSpec
    group: Callable[[ToolDict], ToolDict]
    state: Callable[[Record, ToolDict], ToolDict] | None = None
    encoding: Encoding = OURS
    check: Callable[[Converted], Any] = lambda converted: None
    complete: Callable[[ToolDict, Converted], ToolDict] = lambda found, converted: found


@final
class Exported:
    """``source`` as a tool would save it, or under no tool's name an optimizer of ours. Nothing is computed yet;
    ``report`` is complete when it has been."""

    def __init__(self, source: Source, tool: str, exporter: Exporter, fill: Fill) -> None:
        plan = exporter.plan(source)
        self.converted = Converted(source, plan.spec, fill, plan.encoding)
        if tool:
            self.converted.report.after = f"{plan.spec.rule} of {tool}"
        plan.check(self.converted)
        self.tool, self.exporter, self.group = tool, exporter, plan.group
        self._plan = plan

    @property
    def report(self) -> Conversion:
        return self.converted.report

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.converted.layout().values())

    @torch.no_grad()
    def state_dict(self, zeros: Zeros = in_memory) -> dict[str, Any]:
        """For the tool's ``load_state_dict``; ``zeros`` may make the tensors elsewhere. Raises ValueError for a tool
        that has none."""
        make = self._plan.state
        if make is None:
            raise ValueError(
                f"{self.tool} has no state_dict of an optimizer: memopt convert IN OUT --to {self.tool} writes a folder"
            )
        groups, records = self.converted.groups, self.converted.source.records
        names = [name for group in groups for name in group.names]
        numbers: dict[str, Any] = {name: name if self.exporter.named else i for i, name in enumerate(names)}
        state = {numbers[name]: make(records[name], parts) for name, parts in self.converted.states(zeros)}
        members = [{**self.group(group.hyper), "params": [numbers[name] for name in group.names]} for group in groups]
        return self._plan.complete({"state": state, "param_groups": members}, self.converted)


#: ``write(exported, path, zeros, checkpoint, progress)``: durable under ``path``, which does not exist. ``zeros`` makes
#: tensors in a file, for what cannot be in memory at once; ``checkpoint`` is where the state is from, if one of ours.
Write = Callable[[Exported, Path, Zeros, "Checkpoint | None", Progress], None]


def to_file(exported: Exported, path: Path, zeros: Zeros, checkpoint: Checkpoint | None, progress: Progress) -> None:
    """What ``torch.save`` writes of the dictionary."""
    save_durably(exported.state_dict(counted(zeros, progress)), path)


def counted(zeros: Zeros, progress: Progress) -> Zeros:
    """The same, and the bytes are told."""

    def telling(dtype: str, shape: Shape) -> Tensor:
        x = zeros(dtype, shape)
        progress(x.nbytes)
        return x

    return telling


def save_durably(content: Any, path: Path) -> None:
    """``torch.save``, durably."""
    with open(path, "wb") as file:
        torch.save(content, file)
        gc.collect(1)  # torch.save of torch 2.6 leaves the tensors in a cycle of a class it makes
        file.flush()
        os.fsync(file.fileno())


class Exporter(NamedTuple):
    """One tool. ``plan(source)`` raises ValueError for what it cannot hold; ``named`` says that parameters are called
    by name in its dictionaries, ``folder`` that what it writes is one."""

    plan: Callable[[Source], ExportPlan]
    write: Write = to_file
    named: bool = False
    folder: bool = False


def in_blocks(fmt: FlatBlocks, *, whole: bool = False) -> Callable[..., MomentCodes]:
    """Every moment in ``fmt``, or in 32 bits where that declines it (``whole``: or has no whole number of blocks)."""

    def codes(spec: OptimSpec, h: Mapping[str, Any], name: str, shape: Shape) -> MomentCodes:
        ragged = whole and torch.Size(shape).numel() % fmt.block
        return [
            (m, CODES["32bit"] if ragged or fmt.declines(m, shape) else fmt) for m in RULES[spec.rule].moments(h, shape)
        ]

    return codes


def by_moment(parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``moment -> part -> tensor`` of a state; a moment of a single part has it under the empty name."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in parts.items():
        moment, _, part = key.partition(".")
        if key != "step":
            found.setdefault(moment, {})[part] = value
    return found
