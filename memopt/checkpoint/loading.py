"""``memopt.load``: a checkpoint, whatever wrote it, into what is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memopt.checkpoint import background_save
from memopt.checkpoint.conversion.compatibility import Fill
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.importers import read_state_dict
from memopt.checkpoint.io import json_values
from memopt.checkpoint.io import rng_state as random_state
from memopt.checkpoint.load_dict import apart
from memopt.checkpoint.load_model import plan_common, plan_model
from memopt.checkpoint.load_state import StateLoad
from memopt.checkpoint.opened import Checkpoint
from memopt.checkpoint.state.detect import is_foreign, read_path
from memopt.core.user_warning import warn
from memopt.partitions.ranks import Ranks

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer


@dataclass
class Loaded:
    """What :func:`load` did: where from, after how many steps, what the optimizer's conversion lost."""

    path: Path
    step: int
    conversion: Conversion | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}, step {self.step}", *self.notes]
        return "\n".join(lines + ([str(self.conversion)] if self.conversion else []))


@torch.no_grad()
def load(
    path: str | Path | Mapping[str, Any],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    rng: bool = True,
    hyper: bool = True,
    fill: Fill | None = None,
    rule: str | None = None,
    strict: bool = True,
) -> Loaded:
    """Load a checkpoint, whatever wrote it, into what is given.

    The optimizer keeps its own spec: where that is not the saved one, state is converted while it is read, cut for
    this world size, and the report says what was lost. Nothing is executed from the file, and nothing is changed before
    every checksum has been verified and everything is known to fit. Every rank of a distributed run must call this.

    Args:
        path: A folder of :func:`save`, of which the newest checkpoint is loaded; one checkpoint; a ``state_dict()`` of
            torch.optim, transformers' Adafactor, bitsandbytes, torchao or flashoptim; a file with one; or a checkpoint
            folder of DeepSpeed or torch.distributed.checkpoint. What another tool wrote goes into ``optimizer`` alone.
        model: Whose parameters and buffers are replaced.
        optimizer: A :class:`memopt.Optimizer`, whose state, groups and hyperparameters are replaced.
        scheduler: Anything with a ``load_state_dict()``.
        rng: Also set the random generators, where their state was saved.
        hyper: False keeps the optimizer's own hyperparameters and allows other param groups.
        fill: What stands in for a moment that was not saved: moment -> 0, or the name of another moment (see
            :meth:`memopt.Optimizer.convert_`).
        rule: Which rule it was, where another tool's file does not show it.
        strict: False takes what is in both, by name: a layer that was added stays as it is and its state begins at
            zero, one that was removed is left, and of a weight with more or fewer rows the rows in both are taken. The
            ``notes`` say which. A param group takes the hyperparameters that its parameters were saved with, if those
            are the same for all of them.

    Returns:
        A :class:`Loaded`: path, step, ``extra`` as saved, the ``conversion``'s relative errors, and ``notes``.

    Raises:
        FileNotFoundError: for no checkpoint there.
        ValueError: with the file, the parameter or the tensor that is wrong or does not fit.

    >>> import memopt
    >>> model = torch.nn.Linear(4, 4); theirs = torch.optim.AdamW(model.parameters())
    >>> model(torch.ones(1, 4)).sum().backward(); theirs.step()
    >>> opt = memopt.create(model, "adamw-8bit")
    >>> memopt.load(theirs.state_dict(), optimizer=opt, rule="adamw").step
    1
    """
    if isinstance(path, Mapping) or is_foreign(Path(path)):
        return _load_foreign(path, optimizer, hyper, fill or {}, rule, [model, scheduler], strict)
    if optimizer is None and (rule is not None or fill or not hyper):
        raise ValueError("rule=, fill= and hyper=False are about an optimizer's state; give optimizer=")
    background_save.wait_for(Path(path).absolute())  # what is being saved there is the newest
    ranks = Ranks(optimizer.process_group if optimizer is not None else None, "memopt.load")
    checkpoint, plans, error = None, [], None
    notes: list[str] = []
    try:
        checkpoint = Checkpoint(Path(path))
        if model is not None:
            apply, notes = (plan_model(checkpoint, model), []) if strict else plan_common(checkpoint, model)
            plans.append(apply)
        state = None
        if optimizer is not None:
            state = StateLoad(optimizer, checkpoint.optimizer_of(rule), hyper, fill or {}, strict)
            notes += state.notes
        saved = _scheduler(checkpoint) if scheduler is not None else None
        generators = checkpoint.random_state(ranks.rank) if rng else {}
    except Exception as failure:
        error = failure
    ranks.agree(error)
    assert checkpoint is not None
    loaded = Loaded(checkpoint.path, checkpoint.step, extra=checkpoint.extra, notes=notes)
    try:
        with _changing(optimizer, checkpoint.path):
            for apply in plans:
                apply()
            if state is not None:
                loaded.conversion = state.apply()
            if scheduler is not None:
                scheduler.load_state_dict(saved)
            if generators:
                random_state.set_(generators)
            elif rng:
                loaded.notes.append(f"no random state of rank {ranks.rank} was saved; the generators stay as they are")
    finally:
        checkpoint.close()
    return loaded


@contextmanager
def _changing(optimizer: Optimizer | None, path: Path) -> Iterator[None]:
    """Around all that is changed by loading, which has been checked. What stops in the middle is refused by the
    optimizer from then on; where there is none, a warning is all that can be left."""
    if optimizer is not None:
        with optimizer.store.restoring("memopt.load"):
            yield
        return
    try:
        yield
    except BaseException:
        warn(
            f"loading {path} stopped in the middle: what was to be loaded is partly as it was and partly as in the "
            "checkpoint; load again"
        )
        raise


def _load_foreign(
    path: Any, optimizer: Optimizer | None, hyper: bool, fill: Fill, rule: str | None, others: list[Any], strict: bool
) -> Loaded:
    if optimizer is None or any(other is not None for other in others):
        raise ValueError("another tool's state_dict is loaded into optimizer= alone; load the rest with that tool")
    if isinstance(path, Mapping):
        source, where = read_state_dict(apart(optimizer.store, path), "the state_dict", rule), Path()
    else:
        source, where = read_path(Path(path), rule), Path(path)
    plan = StateLoad(optimizer, source, hyper, fill, strict)
    step = int(max((record.step for record in source.records.values()), default=0))
    with optimizer.store.restoring("memopt.load"):
        return Loaded(where, step, plan.apply(), notes=plan.notes)


def _scheduler(checkpoint: Checkpoint) -> Any:
    if "scheduler" not in checkpoint.body:
        raise ValueError(f"{checkpoint.path} holds no scheduler")
    return json_values.decode(checkpoint.body["scheduler"])
