"""A checkpoint on the disk, checked and open for reading."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import Raw
from memopt.checkpoint.io import (
    checkpoint_dir,
    contents,
    json_values,
    manifest,
    manifest_checks,
    rng_state,
    whole_checkpoints,
)
from memopt.checkpoint.state import slabs
from memopt.checkpoint.state.moment_codes import CODES
from memopt.checkpoint.state.saved import DimRange, Record, SavedGroup, SavedMaster, SavedPiece, Source, Stored
from memopt.checkpoint.state.slabs import Slab
from memopt.checkpoint.tensorfile import DamagedFile, Progress, TensorFile, verify_file
from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape, is_narrow
from memopt.formats import Format
from memopt.masters import MASTERS
from memopt.partitions import PARTITIONS
from memopt.rules import Moment
from memopt.spec import OptimSpec
from memopt.untrusted.names import within
from memopt.untrusted.text import printable


@final
class FilePiece(SavedPiece):
    """Rows of one moment in one rank's file."""

    def __init__(self, rows: Rows, file: TensorFile, name: str) -> None:
        self.rows, self._file, self._name = rows, file, name

    def key(self, part: str) -> str:
        return f"{self._name}.{part}" if part else self._name

    def read(self, part: str, span: DimRange) -> Tensor:
        return self._file.read(self.key(part), span)

    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        self._file.read_into(self.key(part), span, out)


class Checkpoint:
    """``path`` is a checkpoint or a folder of them. Checksums of all files are verified before anything is used.

    Raises FileNotFoundError, or :class:`~memopt.checkpoint.tensorfile.DamagedFile` with the file and what is wrong
    with it.
    """

    def __init__(
        self, path: Path, progress: Progress = lambda nbytes: None, written: dict[str, Any] | None = None
    ) -> None:
        """``written``: the manifest of a checkpoint whose every byte has just been summed while it was written."""
        self.path = checkpoint_dir.find(path)
        self._files: dict[str, TensorFile] = {}
        try:
            self._open(progress, written)
        except DamagedFile as error:
            self.close()
            if path == self.path:
                raise
            other = whole_checkpoints.newest(path, self.path, Checkpoint)
            rest = (
                f"the newest whole checkpoint there is {other.name}" if other else "no other checkpoint there is whole"
            )
            raise DamagedFile(f"{error}; {rest}") from None
        except BaseException:
            self.close()
            raise
        if written is None:
            whole_checkpoints.remember(self.path)

    def _open(self, progress: Progress, written: dict[str, Any] | None) -> None:
        self.body = manifest.read(self.path) if written is None else written
        self.step: int = self.body["step"]
        for name, info in manifest.file_infos(self.body).items():
            path = within(self.path, name, f"{self.path / checkpoint_dir.MANIFEST}")
            if written is None:
                verify_file(path, info, progress)
            self._files[name] = TensorFile(path)
        self._check_model()
        self.extra: dict[str, Any] = self._decoded(self.body["extra"], "extra")

    def _decoded(self, value: Any, what: str) -> Any:
        try:
            return json_values.decode(value)
        except ValueError as error:
            raise DamagedFile(f"{self.path / checkpoint_dir.MANIFEST} is damaged: {what}: {error}") from None

    def _check_model(self) -> None:
        """The manifest's account of the model is that of the files."""
        model = self.body.get("model", {"tied": {}, "sharded": {}})
        world = self.body["world_size"]
        for name, spec in self.sharded_model.items():
            for slab in self._model_slabs(name):
                file, there = self._files[contents.rank_file(slab.rank, world)], TensorSpec(spec.dtype, slab.size)
                if file.specs.get(contents.SHARDED_MODEL + name) != there:
                    raise DamagedFile(f"{file.path} does not have the rows of {name} that the manifest says ({there})")
        for name, same in model["tied"].items():
            if same not in self.model_specs:
                raise DamagedFile(f"{self.path}: {name} is tied to {same}, which is not there")
        for name in self.model_specs:
            if not name.isprintable():
                raise DamagedFile(f"{self.path}: a tensor of the model has the name {printable(name, 60)}")

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    @property
    def model(self) -> TensorFile | None:
        return self._files.get(contents.MODEL_FILE)

    @cached_property
    def sharded_model(self) -> dict[str, TensorSpec]:
        """Tensors of the model whose rows are in the ranks' files, whole."""
        sharded = self.body.get("model", {}).get("sharded", {})
        return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in sharded.items()}

    @cached_property
    def model_specs(self) -> dict[str, TensorSpec]:
        """All tensors of the model, whole."""
        return {**(self.model.specs if self.model is not None else {}), **self.sharded_model}

    def _model_slabs(self, name: str) -> list[Slab]:
        """Where a tensor of the model is, of which ranks have parts."""
        saved = self.body["model"].get("slabs", {}).get(name)
        if saved is None:
            return slabs.by_rows(self.sharded_model[name].shape, self.body["world_size"])
        return [Slab(rank, tuple(offset), tuple(size)) for rank, offset, size in saved]

    def read_model(self, name: str, rows: Rows, out: Tensor, columns: slabs.ColumnSlices = ()) -> None:
        """These rows of a tensor of the model, and of these its ``columns``, into ``out``, from wherever they are."""
        if columns:
            whole = out.new_empty((rows.bounds[1] - rows.bounds[0], *self.model_specs[name].shape[1:]))
            self.read_model(name, rows, whole)
            out.copy_(whole[(slice(None), *columns)])
            return
        start, stop = rows.bounds
        spec = self.sharded_model.get(name)
        if spec is None:
            assert self.model is not None
            self.model.read_into(name, None if rows.is_whole else (start, stop), out)
            return
        found, world = self._model_slabs(name), self.body["world_size"]
        key = contents.SHARDED_MODEL + name
        slabs.copy_rows(found, spec.shape, (start, stop), out, lambda r: self._files[contents.rank_file(r, world)], key)

    @property
    def nbytes(self) -> int:
        return sum(info["nbytes"] for info in self.body["files"].values())

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """The generators' state of one rank, empty where that rank was not saved."""
        file = self._files.get(contents.rank_file(rank, self.body["world_size"]))
        names = [n for n in file.specs if n.startswith(contents.RANDOM)] if file and self.body["random"] else []
        if not names or file is None:
            return {}
        states = {name.removeprefix(contents.RANDOM): file.read(name) for name in names}
        try:
            rng_state.check(states)
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise DamagedFile(f"{file.path} has no random state that can be: {printable(str(error), 100)}") from None
        return states

    def optimizer_of(self, rule: str | None = None) -> Source:
        """The optimizer's state. Raises ValueError where there is none, and for another rule than was said."""
        source = self.optimizer()
        if source is None:
            raise ValueError(f"{self.path} holds no optimizer")
        if rule not in (None, source.spec.rule):
            raise ValueError(
                f"{self.path} is of {source.spec.rule}, not {rule!r}; rule= (--from) is for what other "
                "tools wrote and does not say it"
            )
        return source

    def optimizer(self) -> Source | None:
        """The optimizer's state, as pieces in the ranks' files."""
        saved = self.body.get("optimizer")
        if saved is None:
            return None
        spec = OptimSpec(
            **{**_axes(saved["spec"]), "engine": saved["engine"], "overrides": saved["overrides"]},
            hyper=self._decoded(saved["hyper"], "the hyperparameters"),
            rules=self._decoded(saved["rules"], "the hyperparameters of its rules") if "rules" in saved else {},
        )
        groups = [
            SavedGroup(group["parameters"], self._decoded(group["hyper"], f"param group {i}"))
            for i, group in enumerate(saved["groups"])
        ]
        records = {name: self._record(name, entry, saved) for name, entry in saved["parameters"].items()}
        others = json_values.decode(saved.get("others", {}))
        named, seed, skipped = saved["named"], saved["seed"], saved["skipped_steps"]
        return Source(spec, groups, records, str(self.path), named, seed, skipped, others=others)

    def _record(self, name: str, entry: dict[str, Any], saved: dict[str, Any]) -> Record:
        shape = tuple(entry["shape"])
        moments = {
            moment: self._stored(name, Moment(moment, signed=code["signed"]), code["format"], entry, saved)
            for moment, code in entry.get("moments", {}).items()
        }
        dtype = entry.get("dtype", "")
        master = self._master(name, entry["master"], dtype, entry, saved) if "master" in entry else None
        weights = self._weights(name, dtype, shape)
        own = self._own(name, entry, saved) if "own" in entry else None
        return Record(name, shape, entry.get("step", 0.0), moments, "moments" in entry, dtype, master, weights, own)

    def _own(self, name: str, entry: dict[str, Any], saved: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
        """What the user has put beside the state: of tensors what the rank had, or the first."""

        def read(rank: int) -> dict[str, Any]:
            of = rank if rank < saved["world_size"] else 0
            file = self._files[contents.rank_file(of, self.body["world_size"])]
            tensors = {key: file.read(f"{name}/{key}").clone() for key in entry["own_tensors"]}
            return {**json_values.decode(entry["own"]), **tensors}

        return read

    def _master(self, name: str, master: str, dtype: str, entry: dict[str, Any], saved: dict[str, Any]) -> SavedMaster:
        if master not in MASTERS:
            raise ValueError(f"{self.path}: {name} has a master {master!r}, which this version does not know")
        raw = Raw(MASTERS[master].stored_dtype(dtype))
        stored = self._pieces(name, Moment(MASTERS[master].key), raw, entry, saved)
        return SavedMaster(MASTERS[master], dtype, stored, self._weights(name, dtype, tuple(entry["shape"])))

    def _weights(self, name: str, dtype: str, shape: Shape) -> Callable[[Rows], Tensor] | None:
        """The parameter itself, if the checkpoint has a model with it."""
        there = self.body.get("model", {}).get("tied", {}).get(name, name)
        if self.model_specs.get(there) != TensorSpec(dtype, shape):
            return None
        file = self.model
        if file is not None and there not in self.sharded_model:
            return lambda rows: file.read(there, rows.bounds if shape else None)

        def gathered(rows: Rows) -> Tensor:
            out = torch.empty(rows.local_shape, dtype=getattr(torch, dtype))
            self.read_model(there, rows, out)
            return out

        return gathered

    def _stored(self, name: str, moment: Moment, tag: str, entry: dict[str, Any], saved: dict[str, Any]) -> Stored:
        if tag not in CODES:
            raise ValueError(
                f"{self.path}: {name}.{moment.name} is stored as {tag!r}, which this version does not know"
            )
        return self._pieces(name, moment, CODES[tag], entry, saved)

    def _pieces(self, name: str, moment: Moment, fmt: Format, entry: dict[str, Any], saved: dict[str, Any]) -> Stored:
        world, shape = saved["world_size"], tuple(entry["shape"])
        parts = [Slab(rank, tuple(offset), tuple(size)) for rank, offset, size in entry.get("slabs", ())]
        cut = PARTITIONS[saved["partition"]].rows
        places = [(one.rank, one.rows(shape)) for one in parts] or [(r, cut(shape, r, world)) for r in range(world)]
        pieces = []
        for rank, rows in places:
            if is_narrow(shape) and saved["partition"] == "zero1" and self.body["schema"] == manifest.EARLIER:
                rows = Rows(shape, shape[0] * rank // world, shape[0] * (rank + 1) // world, 1)
            file = self._files[contents.rank_file(rank, self.body["world_size"])]
            piece = FilePiece(rows, file, f"{name}/{moment.name}")
            for part, spec in fmt.layout(moment, rows).items():
                if file.specs.get(piece.key(part)) != spec:
                    raise DamagedFile(
                        f"{file.path}: {piece.key(part)} is {file.specs.get(piece.key(part))}, and "
                        f"the manifest says {spec}"
                    )
            pieces.append(piece)
        by_rows = slabs.assembled(shape, zip(parts, pieces, strict=True)) if parts else tuple(pieces)
        return Stored(moment, fmt, shape, by_rows)


def check_written(path: Path, body: dict[str, Any]) -> None:
    """Nothing is committed, and nothing earlier removed, that loading would refuse."""
    manifest_checks.check(body, str(path / checkpoint_dir.MANIFEST))
    checkpoint = Checkpoint(path, written=body)
    try:
        checkpoint.optimizer()
    finally:
        checkpoint.close()


def _axes(text: str) -> dict[str, str]:
    from memopt.spec import parse

    spec = parse(text)
    return {axis: getattr(spec, axis) for axis in ("rule", "format", "fallback", "master", "placement", "partition")}
