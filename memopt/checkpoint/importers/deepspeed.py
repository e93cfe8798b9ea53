"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, and its universal ones.

Each rank's file has flat tensors, one for each param group (stage 3: sub-group): moments, and the fp32 weights. Where a
parameter's fragments are in them, stages 1 and 2 say (``param_slice_mappings``); stage 3 cuts every parameter into
``ceil(numel / ranks)`` elements for each rank, in order. A universal checkpoint has one file for each moment.

Source: deepspeed/utils/zero_to_fp32.py and deepspeed/checkpoint/ds_to_universal.py of DeepSpeed 0.19.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import saved_master
from memopt.checkpoint.importers import muon, own_dict, safe_unpickle, torch_optim
from memopt.checkpoint.importers.base import choose, group_of
from memopt.checkpoint.importers.base import steps as steps_of
from memopt.checkpoint.importers.gathered import GatheredPiece, from_fragments, gathered
from memopt.checkpoint.state import deepspeed_files
from memopt.checkpoint.state.deepspeed_files import FlatVector, between, pieces_of
from memopt.checkpoint.state.saved import Record, Source
from memopt.core.rows import Shape
from memopt.masters.base import LOW_PRECISION
from memopt.spec import OptimSpec
from memopt.untrusted import Refused, laid_out
from memopt.untrusted.names import MAX_COMPONENT, component, label, within
from memopt.untrusted.opening import read_file
from memopt.untrusted.text import shown

NAME = "DeepSpeed"
_OPTIM, _MODEL, _UNIVERSAL = "*_optim_states.pt", "*_model_states.pt", "zero"
#: The fp32 weights, under the name that universal checkpoints give them.
_WEIGHTS = "fp32"

#: parameter -> moment -> the flat tensors that follow one another.
FragmentFiles = dict[str, dict[str, list[Any]]]


def find(path: Path) -> Path | None:
    """The checkpoint that ``path`` is, or the one that its ``latest`` names; None where there is none."""
    for latest in ("latest", "latest_universal"):
        if (path / latest).is_file():
            named = read_file(within(path, latest, str(path)), MAX_COMPONENT + 2, "the name of a folder")
            path = within(path, named.decode(errors="replace").strip(), str(path / latest))
            break
    there = path.is_dir() and (any(path.glob(_OPTIM)) or (path / _UNIVERSAL / "optimizer_state.pt").is_file())
    return path if there else None


def _load(file: Path) -> Any:
    """A file of the folder's, which is no link to somewhere else."""
    return safe_unpickle.unpickled(within(file.parent, file.name, str(file.parent)))


def read(path: Path, rule: str | None) -> Source:
    """The optimizer state of the checkpoint ``path``. Raises ValueError for what is damaged, missing, or cut in other
    ways (experts, tensor or pipeline parallelism)."""
    with laid_out(str(path), "a checkpoint of DeepSpeed"):
        shapes, dtypes = _parameters(path)
        own = None
        if (path / _UNIVERSAL).is_dir():
            groups, fragments, steps = _universal(within(path, _UNIVERSAL, str(path)), shapes)
        else:
            groups, fragments, steps, own = _partitioned(_rank_files(path), shapes)
        records = {
            name: _record(path, name, shape, dtypes.get(name, ""), step, fragments[name])
            for names, step in zip(shapes, steps, strict=True)
            for name, shape in names.items()
        }
        if own is not None:
            return deepspeed_files.named(own, str(path), rule, shapes, records)
        return _source(path, rule, groups, shapes, fragments, records)


def _parameters(path: Path) -> tuple[list[dict[str, Shape]], dict[str, str]]:
    """``(name -> shape for each param group, name -> dtype)``, as the model's file says."""
    files = _in_order(path.glob(_MODEL))
    if not files:
        raise ValueError(f"{path} has no {_MODEL}, which tells the names of parameters")
    if any("mp_rank_00" not in file.name for file in files):
        raise ValueError(f"{path} is cut by tensor or pipeline parallelism, which is not read")
    content = _load(files[0])
    try:
        shapes = [
            {component(name, f"{files[0]}, a parameter,"): _shape(name, shape) for name, shape in group.items()}
            for group in content["param_shapes"]
        ]
        module = content["module"]
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in module.items() if isinstance(t, Tensor)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{files[0]} is not a model's file of DeepSpeed: it lacks {error}") from None
    if len({name for group in shapes for name in group}) != sum(map(len, shapes)) or not shapes:
        raise Refused(f"{files[0]} has param_shapes with no groups, or with a parameter in two of them")
    return shapes, dtypes


def rest_of(path: Path) -> Mapping[str, Any]:
    """What the model's file has: the engine's counters, the model's buffers, the caller's own."""
    content = _load(_in_order(path.glob(_MODEL))[0])
    if not isinstance(content, Mapping) or type(content.get("global_steps")) is not int:
        raise Refused(f"{path}: its model's file does not say how many steps were taken")
    return content


def _shape(name: str, shape: Any) -> Shape:
    good = isinstance(shape, (tuple, list)) and all(type(n) is int and n >= 0 for n in shape)
    if not good or prod(n for n in shape if n) >= 2**62:
        raise Refused(f"{name} has the shape {shown(shape)}")
    return tuple(shape)


def _in_order(files: Iterator[Path]) -> list[Path]:
    """By the numbers in their names: rank 10 is behind rank 9."""
    return sorted(files, key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])


def _rank_files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    files = _in_order(path.glob(_OPTIM))
    found = [(file, _load(file)["optimizer_state_dict"]) for file in files]
    ranks = {max(n) if isinstance(n := content["partition_count"], list) else n for _, content in found}
    if ranks != {len(files)}:
        raise ValueError(f"{path} has the optimizer state of {len(files)} ranks, and {max(ranks)} wrote it")
    if any(content.get("ds_zero_partition_groups") for _, content in found):
        raise ValueError(f"{path} has experts that are cut over groups of their own, which is not read")
    return found


def _partitioned(
    files: list[tuple[Path, dict[str, Any]]], shapes: list[dict[str, Shape]]
) -> tuple[list[dict[str, Any]], FragmentFiles, list[float], Source | None]:
    """``(param groups, fragments, step of each group, what is known of an optimizer of ours)``"""
    fragments: FragmentFiles = {name: {} for group in shapes for name in group}
    own: Source | None = None
    ours: list[tuple[str, Mapping[str, Any]]] = []
    for file, content in files:
        third = "fp32_flat_groups" in content
        base = content["optimizer_state_dict" if third else "base_optimizer_state"]
        if not isinstance(base, Mapping):
            raise ValueError(f"{file} is an elastic checkpoint, whose optimizer state is not that of flat partitions")
        weights = content["fp32_flat_groups" if third else "single_partition_of_fp32_groups"]
        flats: list[dict[str, FlatVector]]
        if own_dict.wrote(base) and deepspeed_files.is_of_rows(base):
            ours.append((str(file), base))
            flats = [_flat({}, w, file) for w in weights]
        elif own_dict.wrote(base):
            own_source, moments = deepspeed_files.vectors(base, str(file))
            own = replace(own_source, records={})
            if len(moments) != len(weights):
                raise Refused(f"{file} has the state of {len(moments)} vectors and {len(weights)} vectors of weights")
            flats = [{**_flat({}, w, file), **found} for w, found in zip(weights, moments, strict=True)]
        else:
            flats = [_flat(base["state"].get(i, {}), w, file) for i, w in enumerate(weights)]
        if third:
            _cut_evenly(flats, shapes, len(files), fragments)
        else:
            _cut_as_said(flats, content["param_slice_mappings"], fragments)
    groups = base["param_groups"]
    if ours:
        own = deepspeed_files.of_rows(ours, {name: shape for group in shapes for name, shape in group.items()})
        return groups, fragments, [0.0] * len(shapes), own
    states = [base["state"].get(i, {}) for i in range(len(weights))]
    # Stage 3 may have several sub-groups in a param group: they step together.
    steps = [_step(states[min(i, len(states) - 1)], group) for i, group in enumerate(groups)]
    return groups, fragments, steps, own


def _step(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    step = state.get("step", group.get("step", 1))
    if not (isinstance(step, Tensor) and step.numel() == 1) and type(step) not in (int, float):
        raise Refused(f"the number of steps is {shown(step)}")
    return steps_of(float(step), "a param group")


def _flat(state: Mapping[str, Any], weights: Any, file: Path) -> dict[str, FlatVector]:
    """The flat tensors of one group on one rank."""
    moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() and k != "step"}
    for name, tensor in ((_WEIGHTS, weights), *moments.items()):
        label(name, str(file))
        _numbers(tensor, f"{file}: {name}")
        if tensor.dim() != 1:
            raise Refused(f"{file}: {name} is {list(tensor.shape)}, and flat tensors have one dimension")
    return {_WEIGHTS: weights, **moments}


def _numbers(tensor: Any, what: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise Refused(f"{what} is {shown(tensor)}, not a tensor of floating-point numbers")
    return tensor


def _cut_as_said(flats: list[dict[str, FlatVector]], mappings: list[dict[str, Any]], found: FragmentFiles) -> None:
    for flat, mapping in zip(flats, mappings, strict=True):
        for name, address in mapping.items():
            for moment, tensor in flat.items():
                if not all(type(n) is int and n >= 0 for n in (address.start, address.numel)):
                    raise Refused(f"{name} is at {shown(address.start)}")
                piece = between(tensor, address.start, address.start + address.numel)
                found[name].setdefault(moment, []).append(piece)


def _cut_evenly(
    flats: list[dict[str, FlatVector]], shapes: list[dict[str, Shape]], world: int, found: FragmentFiles
) -> None:
    ends = list(accumulate(flat[_WEIGHTS].numel() for flat in flats))
    for moment in dict.fromkeys(moment for flat in flats for moment in flat):
        first = 0
        for name, shape in (item for group in shapes for item in group.items()):
            share = -(-prod(shape) // world)
            if moment not in flats[min(bisect_right(ends, first), len(flats) - 1)]:
                first += share
                continue
            left = prod(shape) - sum(t.numel() for t in found[name].get(moment, []))
            here = pieces_of(flats, moment, _WEIGHTS, first, first + min(share, left))
            found[name].setdefault(moment, []).extend(here)
            first += share


def _universal(folder: Path, shapes: list[dict[str, Shape]]) -> tuple[list[dict[str, Any]], FragmentFiles, list[float]]:
    state = _load(folder / "optimizer_state.pt")
    base = state.get("optimizer_state_dict", state)
    # For stage 3 the nested groups are those of one rank's file, or what all groups have in common.
    groups, fragments, steps = state.get("param_groups", base["param_groups"]), {}, []
    for i, group in enumerate(shapes):
        counted = base.get("state", {}).get(i, {})
        for name in group:
            inside = within(folder, name, str(folder))
            files = {label(file.stem, str(inside)): file for file in sorted(inside.glob("*.pt"))}
            if "step" in files:
                counted = {"step": _load(files.pop("step"))}
            contents = {moment: _load(file) for moment, file in files.items()}
            fragments[name] = {
                moment: [
                    _numbers(
                        content["param"] if isinstance(content, Mapping) else content, f"{inside}: {moment}"
                    ).reshape(-1)
                ]
                for moment, content in contents.items()
            }
        steps.append(_step(counted, groups[i]))
    return groups, fragments, steps


def _source(
    path: Path,
    asked: str | None,
    groups: list[dict[str, Any]],
    shapes: list[dict[str, Shape]],
    fragments: FragmentFiles,
    records: dict[str, Record],
) -> Source:
    moments = {moment for found in fragments.values() for moment in found} - {_WEIGHTS}
    mixed = any("use_muon" in group for group in groups)
    rule = "muon" if mixed else choose(NAME, str(path), _rules(groups[0], moments), asked)
    ours = []
    for group, names in zip(groups, shapes, strict=True):
        own = muon.rule_of(group) if mixed else rule
        hyper = muon.hyper(group, own) if mixed else torch_optim.hyper(group, rule)
        ours.append(group_of(list(names), own, hyper, group))
        ours[-1].hyper.update({"rule": own} if mixed else {})
    spec = OptimSpec(rule=rule, fallback="adamw" if mixed else "")
    return Source(spec, ours, records, str(path), label=f"{rule} of {NAME}")


def _rules(group: Mapping[str, Any], moments: set[str]) -> tuple[str, ...]:
    """torch.optim's say what they are; DeepSpeed's own Adam does not tell its two modes apart."""
    possible = torch_optim.rules(group, {})
    if possible or moments - {"exp_avg", "exp_avg_sq"}:
        return possible
    return ("adamw", "adam") if "exp_avg_sq" in moments else ("lion",) if "exp_avg" in moments else ()


def _record(path: Path, name: str, shape: Shape, dtype: str, step: float, found: dict[str, list[Tensor]]) -> Record:
    for moment, pieces in found.items():
        numel = sum(piece.numel() for piece in pieces)
        if numel != prod(shape):
            raise ValueError(f"{path}: {name} has {prod(shape):,} elements, and {numel:,} of {moment} are there")
    moments = {m: gathered(m, shape, from_fragments(pieces)) for m, pieces in found.items() if m != _WEIGHTS}
    whole = GatheredPiece(shape, from_fragments(found[_WEIGHTS])) if _WEIGHTS in found else None
    weights = None if whole is None else lambda rows: whole.read("", rows.bounds if shape else None)
    if not moments:
        return Record(name, shape, stepped=False, dtype=dtype, weights=weights)
    master = None
    if dtype in LOW_PRECISION and whole is not None and all(p.dtype == torch.float32 for p in found[_WEIGHTS]):
        master = saved_master("fp32", dtype, shape, (whole,), None)
    return Record(name, shape, step, moments, dtype=dtype, master=master, weights=weights)
