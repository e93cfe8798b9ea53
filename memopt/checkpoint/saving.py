"""``memopt.save``: a checkpoint that is there or is not there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint import background_save
from memopt.checkpoint.background_save import Saving
from memopt.checkpoint.io import checkpoint_dir, contents, json_values, lock, manifest, whole_checkpoints
from memopt.checkpoint.io import rng_state as random_state
from memopt.checkpoint.io.safetensors_write import Syncing, file_order, write_file
from memopt.checkpoint.opened import Checkpoint, check_written
from memopt.checkpoint.tensorfile import FileInfo, spec_of
from memopt.partitions.ranks import Ranks

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer

Slabs = dict[str, dict[str, Tensor]]


@dataclass
class _Job:
    """One rank's part of a save."""

    ranks: Ranks
    where: Path
    temporary: Path
    files: Slabs
    body: dict[str, Any]
    keep: int

    def run(self) -> None:
        """Write this rank's files; when all ranks have, rank 0 commits. On failure nothing is left behind."""
        infos: dict[str, FileInfo] = {}
        try:
            self.ranks.agree(self._attempt(lambda: infos.update(self._write())))
            everyone = self.ranks.gather(infos)
            self.ranks.agree(self._attempt(lambda: self._commit(everyone)) if self.ranks.rank == 0 else None)
        except BaseException:
            if self.ranks.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        finally:
            if self.ranks.rank == 0:
                lock.end(self.where)

    def _write(self) -> dict[str, FileInfo]:
        """The disk takes one file while the next is written."""
        infos, path = {}, self.temporary
        try:
            with Syncing() as syncing:
                for name, tensors in self.files.items():
                    path = self.temporary / name
                    specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
                    in_order = ((key, tensors[key]) for key in file_order(specs))
                    infos[name] = write_file(path, specs, in_order, syncing=syncing)
                syncing.wait()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.filename or path} could not be written ({error.strerror}); earlier "
                "checkpoints are as they were",
            ) from error
        return infos

    def _commit(self, everyone: list[dict[str, list[Any]]]) -> None:
        files = {name: FileInfo(*info)._asdict() for infos in everyone for name, info in infos.items()}
        check_written(self.temporary, manifest.write(self.temporary, {**self.body, "files": files}))
        final = checkpoint_dir.commit(self.temporary)
        whole_checkpoints.remember(final)
        whole_checkpoints.prune(final, self.keep, Checkpoint)

    @staticmethod
    def _attempt(work: Any) -> BaseException | None:
        try:
            work()
        except Exception as error:
            return error
        return None


def save(
    path: str | Path,
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    rng: bool = True,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    asynchronous: bool = False,
) -> Saving:
    """Write a checkpoint into the folder ``path`` and remove all but the newest ``keep``.

    A checkpoint is a directory of safetensors files and a ``manifest.json``. It is written under another name, made
    durable and renamed: whenever the process, the machine or the disk gives up, what is in the folder is whole.
    Every rank of a distributed run must call this, on a file system that all of them see. Tensors are written from
    where they are, a few megabytes at a time.

    Args:
        path: The folder that holds the run's checkpoints; made if it is not there.
        model: Its parameters and buffers; of a sharded model each rank writes its own rows.
        optimizer: A :class:`memopt.Optimizer`: spec, groups and state.
        scheduler: Anything with a ``state_dict()`` of plain values.
        rng: Also the state of Python's, NumPy's and torch's random generators.
        extra: Plain values (numbers, strings, lists, dictionaries) for :func:`load` to return.
        keep: Number of checkpoints that stay in the folder, >= 1.
        asynchronous: Copy everything to host memory and write it while training goes on; :meth:`Saving.wait` says how
            it went, and so does the next save to the same folder.

    Returns:
        A :class:`Saving` with the checkpoint's ``path``, ``wait()`` and ``done``.

    Raises:
        ValueError: for what cannot be saved.
        OSError: with the file, for a disk that does not take it; earlier checkpoints are as they were.

    >>> import memopt, tempfile
    >>> model = torch.nn.Linear(4, 4); opt = memopt.create(model, "adamw-8bit")
    >>> saving = save(tempfile.mkdtemp(), model=model, optimizer=opt, extra={"epoch": 3})
    >>> memopt.load(saving.path, model=model, optimizer=opt).extra
    {'epoch': 3}
    """
    where = Path(path).absolute()
    if keep < 1:
        raise ValueError(f"keep={keep!r} is not allowed; it must be at least 1")
    background_save.wait_for(where)
    ranks = Ranks(optimizer.process_group if optimizer is not None else None)
    error: Exception | None = None
    files: Slabs = {}
    body: dict[str, Any] = {}
    sharded: dict[str, Any] = {}
    try:
        with torch.no_grad():
            files, body, sharded = _contents(ranks, model, optimizer, scheduler, rng, extra)
    except Exception as failure:
        error = failure
    ranks.agree(error)
    if optimizer is not None and optimizer.partition.world_size > 1:
        _refuse_two_steps(ranks, body["optimizer"])
    others = contents.add_slabs(body, ranks, sharded, optimizer) if ranks.world_size > 1 else set[str]()
    files = {name: {k: x for k, x in tensors.items() if k not in others} for name, tensors in files.items()}
    if asynchronous:
        try:
            files = _copied(files)
        except Exception as failure:
            error = failure
        ranks.agree(error)
    temporary = _begin(ranks, where, body["step"], [x for x in (model, optimizer) if x is not None])
    job = _Job(ranks, where, temporary, files, body, keep)
    saving = Saving(where / temporary.name.removeprefix(checkpoint_dir.WRITING))
    if asynchronous:
        background_save.begin(where, saving, job.run)
    else:
        job.run()
    return saving


def _contents(
    ranks: Ranks, model: Any, optimizer: Any, scheduler: Any, with_rng: bool, extra: Any
) -> tuple[Slabs, dict[str, Any], dict[str, Any]]:
    """This rank's tensors by file, the manifest without the files, and the model's tensors that are sharded."""
    files: Slabs = {}
    sharded: dict[str, Any] = {}
    mine: dict[str, Tensor] = {}
    body: dict[str, Any] = {"step": 0, "world_size": ranks.world_size, "written_by": contents.written_by()}
    if model is not None:
        tensors, tied = contents.model_tensors(model)
        sharded = contents.sharded_tensors(tensors)
        body["model"] = {"tied": tied, "sharded": {name: spec_of(tensors[name]) for name in sharded}}
        if ranks.rank == 0:
            files[contents.MODEL_FILE] = {name: x for name, x in tensors.items() if name not in sharded}
        mine.update({contents.SHARDED_MODEL + name: x.to_local() for name, x in sharded.items()})
    if optimizer is not None:
        body["optimizer"] = contents.optimizer_json(optimizer)
        body["step"] = int(
            max((entry.get("step", 0.0) for entry in body["optimizer"]["parameters"].values()), default=0)
        )
        if ranks.rank == 0 or optimizer.partition.world_size > 1:
            mine.update(contents.optimizer_tensors(optimizer))
    if scheduler is not None:
        body["scheduler"] = json_values.encode(scheduler.state_dict(), "the scheduler")
    body["extra"] = json_values.encode(dict(extra or {}), "extra")
    body["random"] = with_rng
    if with_rng:
        mine.update({contents.RANDOM + name: state for name, state in random_state.get().items()})
    files[contents.rank_file(ranks.rank, ranks.world_size)] = mine
    return files, body, sharded


def _refuse_two_steps(ranks: Ranks, mine: dict[str, Any]) -> None:
    """Raise RuntimeError, on every rank, where the ranks' rows are of different steps: a Ctrl-C may have come before a
    step on one of them and after it on another, and each alone is whole."""
    every = ranks.gather([mine["spec"], mine["seed"], {n: p.get("step", 0.0) for n, p in mine["parameters"].items()}])
    for rank, (spec, seed, steps) in enumerate(every):
        same = [spec, seed, steps] == every[0]
        name = next((n for n, step in every[0][2].items() if steps.get(n) != step), "")
        how = (
            f"{name} has stepped {steps.get(name, 0):.0f} times, and {every[0][2][name]:.0f} on rank 0" if name else ""
        )
        if not same:
            raise RuntimeError(
                f"nothing was saved: the state on rank {rank} is not of the same step as on rank 0 "
                f"({how or f'{spec}, seed {seed}; {every[0][0]}, seed {every[0][1]}'}). Load a checkpoint on all ranks"
            )


def _begin(ranks: Ranks, where: Path, step: int, owners: list[Any]) -> Path:
    """The directory in which all ranks write; rank 0 makes it, and locks the folder for these owners."""
    name, error = "", None
    if ranks.rank == 0:
        locked = False
        try:
            where.mkdir(parents=True, exist_ok=True)
            lock.begin(where, *owners)
            locked = True
            name = checkpoint_dir.begin(where, checkpoint_dir.next_name(where, step)).name
        except OSError as failure:
            if locked:
                lock.end(where)
            is_sentence = failure.errno is None  # it is a sentence already
            error = (
                failure
                if is_sentence
                else OSError(failure.errno, f"{where}: no checkpoint can be begun there ({failure.strerror})")
            )
    ranks.agree(error)
    return where / str(ranks.gather(name)[0])


def _copied(files: Slabs) -> Slabs:
    return {name: {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()} for name, tensors in files.items()}
