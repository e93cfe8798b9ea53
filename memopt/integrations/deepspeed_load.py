"""A checkpoint of DeepSpeed's into an engine of another number of ranks or another ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.importers import deepspeed as files
from memopt.checkpoint.load_state import StateLoad
from memopt.checkpoint.state.flat_vectors import elements, of_fragments, of_vectors
from memopt.checkpoint.state.saved import Source
from memopt.core.param_names import matching
from memopt.integrations.deepspeed import stepped_by
from memopt.optimizer import Optimizer
from memopt.partitions.deepspeed.flat import Flat
from memopt.partitions.deepspeed.fragments import Fragments, Origin
from memopt.partitions.deepspeed.metadata import Unknown, recover
from memopt.partitions.ranks import Ranks

#: What an engine keeps beside the model for itself.
_OWN = (
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
)  # fmt: skip


@torch.no_grad()
def load_checkpoint(engine: Any, path: str | Path, tag: str | None = None) -> tuple[Conversion, dict[str, Any]]:
    """Load what ``engine.save_checkpoint(path, tag)`` wrote on any number of ranks and at any ZeRO stage into an engine
    of any other, as ``engine.load_checkpoint`` does where both are the same.

    Moments are converted where the spec is another; an optimizer of DeepSpeed's or torch's may have written them.
    8-bit codes of DeepSpeed's vectors are decoded and encoded again, for the blocks of other vectors are cut elsewhere;
    rules and formats that step the rows behind the vectors (``adafactor``, ``came``, ``lamb``) are copied bit for bit.
    fp32 weights are copied; parameters that are not trained stay as they are. fp16's loss scale begins anew. Every rank
    must call this.

    Args:
        engine: What ``deepspeed.initialize`` returned, of ZeRO stage 1, 2 or 3, with a ``memopt.Optimizer``.
        path: The folder that was given to ``save_checkpoint``.
        tag: Which of its checkpoints; by default the one that ``latest`` names.

    Returns:
        What became of the state, and what else the checkpoint held (``client_state``).

    Raises:
        FileNotFoundError: where there is no checkpoint.
        ValueError: for other parameters or groups, and for what cannot be converted; nothing was changed.
        RuntimeError: for an engine without a ZeRO stage, or of another optimizer.
    """
    optimizer, zero = stepped_by(engine), engine.optimizer
    if isinstance(zero, Optimizer) or not hasattr(zero, "load_state_dict") or not engine.zero_optimization():
        raise RuntimeError("the engine has no ZeRO stage, and engine.load_checkpoint loads on any number of ranks")
    ranks = Ranks(None, "load_checkpoint")
    error: Exception | None = None
    plan: StateLoad | None = None
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()
    with _vectors(zero):
        try:
            folder = files.find(Path(path) if tag is None else Path(path) / tag)
            if folder is None:
                raise FileNotFoundError(f"{Path(path) / (tag or '')} is no checkpoint of DeepSpeed's")
            source, rest = files.read(folder, None), files.rest_of(folder)
            optimizer.store.notice_replaced()
            origins = recover(optimizer.params.made)
            weights = _weights(source, origins)
            with optimizer.partition.logical_params(optimizer):
                groups = optimizer.param_groups
                if isinstance(optimizer.partition, Flat):
                    source = of_vectors(source, origins, list(optimizer.params.entries()), groups)
                else:
                    source = of_fragments(source, origins, groups)
                plan = StateLoad(optimizer, source, hyper=True, fill={})
        except Unknown as unknown:
            error = RuntimeError(f"the parameters behind DeepSpeed's vectors cannot be found: {unknown}")
        except Exception as failure:
            error = failure
        ranks.agree(error)
        assert plan is not None
        parts = optimizer.partition.fragments if isinstance(optimizer.partition, Fragments) else []
        elsewhere = [f.part for f in parts if not f.is_here]
        with optimizer.partition.logical_params(optimizer), optimizer.store.restoring("load_checkpoint"):
            report = plan.apply()
            for p in elsewhere:
                optimizer.state.pop(p, None)
            for one, x in weights:
                _copy_weight(one, x)
    _to_16_bits(zero)
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False  # views of state that may be other tensors now
    if hasattr(zero, "checkpoint_event_epilogue"):
        zero.checkpoint_event_epilogue()
    return report, _counters(engine, rest)


@contextmanager
def _vectors(zero: Any) -> Iterator[None]:
    """Stage 3 shows the optimizer its vectors while it steps, saves or loads."""
    third = hasattr(zero, "_set_fp32_optimizer_param_groups")
    if third:
        zero._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        if third:
            zero._clear_fp32_optimizer_param_groups()


def _weights(source: Source, origins: list[Origin]) -> list[tuple[Origin, Any]]:
    """What is here of each parameter, and what gives its fp32 weights by rows."""
    theirs, ours = matching(list(source.records), [one.name for one in origins])
    by_name = dict(zip(theirs, source.records.values(), strict=True))
    found = []
    for name, one in zip(ours, origins, strict=True):
        if one.flat is None or not one.spans[one.rank].numel:
            continue
        record = by_name.get(name)
        if record is None or record.weights is None or record.shape != one.shape:
            there = "no weights" if record is None or record.weights is None else f"the shape {list(record.shape)}"
            raise ValueError(f"{source.origin} has {there} of {one.name}, which is {list(one.shape)} here")
        found.append((one, record.weights))
    return found


def _copy_weight(one: Origin, weights: Any) -> None:
    assert one.flat is not None
    span = one.spans[one.rank]
    target = one.flat.detach()[one.at : one.at + span.numel]
    target.copy_(elements(weights, one.shape, span.start, span.stop))


def _to_16_bits(zero: Any) -> None:
    """From the fp32 vectors to the weights that the model computes with, as DeepSpeed does when it has loaded."""
    if not hasattr(zero, "fp16_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    groups = zip(
        zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    )
    for low, high, parts in groups:
        low.data.copy_(high.data)
        for part, x in zip(parts, zero.unflatten(low, parts), strict=True):
            part.data = x.data


def _counters(engine: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine counts, and the scheduler; returns what is the caller's."""
    engine.global_steps = int(rest["global_steps"])
    engine.global_samples = int(rest.get("global_samples", engine.global_steps * engine.train_batch_size()))
    engine.skipped_steps = int(rest.get("skipped_steps", 0))
    scheduler = rest.get("lr_scheduler")
    if engine.lr_scheduler is not None and scheduler is not None:
        engine.lr_scheduler.load_state_dict(scheduler)
    model = rest.get("module", {})
    for name, buffer in engine.module.named_buffers():
        saved = model.get(name)
        if isinstance(saved, Tensor) and saved.shape == buffer.shape:
            buffer.copy_(saved)
    return {key: value for key, value in rest.items() if key not in _OWN}
