"""State for the tools people come from: dictionaries for their ``load_state_dict``, and files and folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memopt.checkpoint.conversion.compatibility import Fill
from memopt.checkpoint.conversion.disk_room import refuse_too_much
from memopt.checkpoint.exporters import EXPORTERS, Exported, own_dict
from memopt.checkpoint.exporters.base import counted, save_durably
from memopt.checkpoint.io.checkpoint_dir import WRITING, sync_directory
from memopt.checkpoint.io.scratch import Scratch
from memopt.checkpoint.state.detect import surroundings
from memopt.checkpoint.state.saved import Source
from memopt.checkpoint.tensorfile import Progress
from memopt.rules import RULES
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.checkpoint.opened import Checkpoint

TOOLS = tuple(EXPORTERS)


def exported(source: Source, tool: str | OptimSpec, fill: Fill | None = None) -> Exported:
    """``source`` as ``tool`` would save it. Raises ValueError for what the tool cannot hold; nothing is computed yet.

    ``tool`` is a spec, for an optimizer of memopt's, or one of :data:`TOOLS`: ``torch``, ``dcp`` (the same for
    torch.distributed.checkpoint, with parameters by name), ``transformers`` (Adafactor), ``bitsandbytes`` (8 bits),
    ``bitsandbytes-32bit``, ``muon`` (the original's with AdamW for the rest, and DeepSpeed's of that name),
    ``torchao`` (8 bits), ``torchao-4bit``, ``torchao-fp8``, ``flashoptim`` or ``deepspeed`` (a universal checkpoint).
    Moments become what it keeps: fp32 for torch and DeepSpeed, factors for Adafactor, its own codes for the others.
    """
    if isinstance(tool, OptimSpec):
        return Exported(source, "", own_dict.exporter_of(tool), fill or {})
    if tool not in EXPORTERS:
        raise ValueError(f"state can be exported to {', '.join(EXPORTERS)}, not to {tool!r}")
    for group in source.groups:
        told = RULES[source.spec.rule_of(group.hyper)].modifiers(group.hyper)
        if told:
            raise ValueError(
                f"{tool} does not know {', '.join(told)}, and its steps would be others: set it to False first"
            )
    return Exported(source, tool, EXPORTERS[tool], fill or {})


def export(source: Source, tool: str | OptimSpec, fill: Fill | None = None) -> dict[str, Any]:
    """A ``state_dict`` for ``tool``, see :func:`exported`."""
    return exported(source, tool, fill).state_dict()


def write(
    found: Exported,
    out: Path,
    checkpoint: Checkpoint | None = None,
    progress: Progress = lambda nbytes: None,
    within: Path | None = None,
) -> None:
    """The file or folder ``out``, durable, or nothing. ``torch.save`` wants all tensors of a file at once: until then
    they are in a file beside ``out``, not in memory. ``checkpoint`` is where the state is from, if it is one of ours.
    ``within`` is a file of ``torch.save``'s (``out`` itself, too) whose other content a file ``out`` has as well: the
    model and the counters of a checkpoint of Lightning's.

    Raises OSError with ``out`` where the disk does not take it; what was there before is there still.
    """
    exporter = found.exporter
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder")
    if exporter.folder and out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    around = None if within is None or exporter.folder else surroundings(within)
    refuse_too_much(found.converted, out, also=0 if around is None or within is None else within.stat().st_size)
    unfinished = out.with_name(WRITING + out.name)
    _remove(unfinished)  # of an export that was stopped
    try:
        with Scratch(out.parent) as scratch, torch.no_grad():
            if around is None:
                exporter.write(found, unfinished, scratch.zeros, checkpoint, progress)
            else:
                save_durably(around(found.state_dict(counted(scratch.zeros, progress))), unfinished)
        os.replace(unfinished, out)
        sync_directory(out.parent)
    except BaseException as error:
        _remove(unfinished)
        disk = _of_the_disk(error)
        if disk is None:
            raise
        raise OSError(disk.errno, f"{out} could not be written ({disk.strerror}); nothing was changed") from error


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """What the disk said, wherever torch.save and dcp.save have wrapped it."""
    while error is not None and not isinstance(error, OSError):
        failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint: rank -> (exception, stack)
        error = next(iter(failures.values()))[0] if failures else error.__cause__ or error.__context__
    return error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
