"""A new checkpoint from another checkpoint, or from another tool's file, without a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.converted_source import Converted
from memopt.checkpoint.conversion.disk_room import refuse_too_much
from memopt.checkpoint.io import checkpoint_dir, contents, json_values, lock, manifest, whole_checkpoints
from memopt.checkpoint.io.safetensors_write import file_order, write_file
from memopt.checkpoint.opened import Checkpoint, check_written
from memopt.checkpoint.tensorfile import FileInfo, Progress, spec_of
from memopt.core.rows import Rows


@torch.no_grad()
def rewrite(
    converted: Converted, checkpoint: Checkpoint | None, out: Path, progress: Progress = lambda nbytes: None
) -> Path:
    """Commit ``converted`` as a checkpoint in the folder ``out``, for one process; model, scheduler, random state of
    rank 0 and extras are those of ``checkpoint``. One parameter's state is in memory at a time."""
    refuse_too_much(converted, out)
    out.mkdir(parents=True, exist_ok=True)
    lock.begin(out)
    try:
        return _rewrite(converted, checkpoint, out, progress)
    finally:
        lock.end(out)


def _rewrite(converted: Converted, checkpoint: Checkpoint | None, out: Path, progress: Progress) -> Path:
    own = converted.own_entries()
    body = _body(converted, checkpoint, own)
    temporary = checkpoint_dir.begin(out, checkpoint_dir.next_name(out, body["step"]))
    try:
        files: dict[str, FileInfo] = {}
        if checkpoint is not None and checkpoint.model is not None:
            path = temporary / contents.MODEL_FILE
            files[contents.MODEL_FILE] = write_file(path, checkpoint.model_specs, _tensors(checkpoint), progress)
        random = checkpoint.random_state(0) if checkpoint is not None else {}
        others = {contents.RANDOM + name: x for name, x in random.items()}
        others |= {f"{p}/{k}": x for p, entries in own.items() for k, x in entries.items() if isinstance(x, Tensor)}
        name = contents.rank_file(0, 1)
        specs = converted.layout() | {k: spec_of(x) for k, x in others.items()}
        files[name] = write_file(temporary / name, specs, _state(converted, others), progress)
        body = manifest.write(temporary, {**body, "files": {n: info._asdict() for n, info in files.items()}})
        check_written(temporary, body)
        final = checkpoint_dir.commit(temporary)
        whole_checkpoints.remember(final)
        whole_checkpoints.prune(final, 2, Checkpoint)
        return final
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, put together from the ranks' rows where it was sharded, one at a time."""
    specs = checkpoint.model_specs
    for name in file_order(specs):
        out = torch.empty(specs[name].shape, dtype=getattr(torch, specs[name].dtype))
        checkpoint.read_model(name, Rows.whole(specs[name].shape), out)
        yield name, out
        del out  # before the next is made


def _state(converted: Converted, others: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for parameter, state in converted.states():
        yield from ((f"{parameter}/{key}", tensor) for key, tensor in state.items() if key != "step")
        del state  # before the next is made
    yield from others.items()


def _body(converted: Converted, checkpoint: Checkpoint | None, own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    source = converted.source
    parameters = converted.parameters_json()
    for name, entries in own.items():
        parameters[name] |= contents.own_json(name, entries)
    steps = [record.step for record in source.records.values()]
    old: dict[str, Any] = (
        checkpoint.body if checkpoint is not None else {"step": int(max(steps, default=0)), "extra": {}}
    )
    return {
        "step": old["step"],
        "world_size": 1,
        "written_by": contents.written_by(),
        **{key: old[key] for key in ("scheduler",) if key in old},
        **({"model": {**old["model"], "sharded": {}}} if "model" in old else {}),
        "optimizer": {
            **({"others": json_values.encode(dict(source.others), "the optimizer's state")} if source.others else {}),
            **contents.spec_json(converted.spec),
            "seed": source.seed or 0,
            "skipped_steps": source.skipped_steps or 0,
            "partition": "none",
            "world_size": 1,
            "named": source.named,
            "groups": [
                {"parameters": group.names, "hyper": json_values.encode(group.hyper, f"param group {i}")}
                for i, group in enumerate(converted.groups)
            ],
            "parameters": parameters,
        },
        "extra": old["extra"],
        "random": bool(old.get("random")),
    }
