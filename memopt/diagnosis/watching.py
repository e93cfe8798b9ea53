"""``memopt.watch``: hooks around ``optimizer.step()`` that measure every few steps and say what they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError
from memopt.diagnosis.causes import find
from memopt.diagnosis.logs import Log, open_logs
from memopt.diagnosis.readings import Finding, GroupReading, History, NonFinite, Reading
from memopt.diagnosis.sampling import estimate_of, shadows
from memopt.diagnosis.shadow import Shadow
from memopt.optimizer import Optimizer
from memopt.placements.gradients.checks import non_finite
from memopt.training.clip import grad_norm, local_part

#: Elements of each parameter by which its update is measured, evenly spaced.
SPREAD = 256
#: Losses kept for looking back; every other one is dropped when there are more.
LOSSES = 4096


class Watch:
    """Made by :func:`watch`. ``readings`` are all measurements so far, ``findings()`` what they mean."""

    def __init__(self, optimizer: torch.optim.Optimizer, every: int, logs: list[Log], out: Callable[[str], Any] | None):
        self.optimizer, self.every, self.out = optimizer, every, out
        self.history = History(
            master=getattr(getattr(optimizer, "spec", None), "master", "none"),
            beta2=(optimizer.param_groups[0].get("betas") or (None, None))[1],
        )
        self.step = 0  # of this watch, from 1
        self._logs = logs
        self._pending: list[tuple[int, Tensor]] = []  # losses that nobody has waited for yet
        self._shadows: list[Shadow] | None = None
        self._made_for: object = None
        self._gathered: list[tuple[Tensor, Tensor, list[int]] | None] = []
        self._before: list[tuple[Tensor, Tensor] | None] | None = None
        self._skipped = getattr(optimizer, "skipped_steps", 0)
        self._told: set[str] = set()
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]

    @property
    def readings(self) -> list[Reading]:
        return self.history.readings

    def loss(self, loss: Any) -> None:
        """The loss of this step, a tensor or a number. Call it before ``optimizer.step()``; it is not waited for."""
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        self._pending.append((self.step + 1, value.reshape(())))

    def findings(self) -> list[Finding]:
        """What a person would look at, the likeliest first; empty for a run in which nothing stands out."""
        self._collect_losses()
        return find(self.history)

    def report(self) -> str:
        """The last reading, and one sentence for each finding."""
        lines = [str(self.readings[-1])] if self.readings else ["no step has been measured yet"]
        return "\n".join([*lines, *(f"{f.cause}: {f.sentence}" for f in self.findings())])

    def close(self) -> None:
        """Take the hooks away and end the logs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for log in self._logs:
            log.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Around the step -------------------------------------------------------------------------------------------

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self._shadows is not None and not self._is_current():
            self._shadows = None  # a conversion, a load, a hand in the state: begin again from what is there
        self._gathered = [shadow.gather() for shadow in self._shadows or ()]
        self._before = [_spread(group) for group in optimizer.param_groups] if self._due() else None

    def _is_current(self) -> bool:
        """Whether the shadows are of the state that is there, under the rule and in the groups that there are."""
        return self._made_for == _plan_of(self.optimizer) and all(shadow.is_current for shadow in self._shadows or ())

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "skipped_steps", 0) > self._skipped
        if skipped:
            self._skipped = optimizer.skipped_steps  # type: ignore[attr-defined]
            self._note_nonfinite(skipped=True)
        elif self._shadows is None:
            self._shadows, self._made_for = list(shadows(optimizer)) or None, _plan_of(optimizer)
            spec = getattr(optimizer, "spec", None)
            self.history.master = getattr(spec, "master", "none")
        else:
            for shadow, gathered in zip(self._shadows, self._gathered, strict=True):
                if gathered is not None:
                    shadow.advance(*gathered)
                shadow.note()
        if self._before is not None:
            self._read(self._before)
            self._before = None

    def _due(self) -> bool:
        """At 1, 2, 4, 8 … while the run is young, then every ``every`` steps."""
        young = self.step < self.every and self.step & (self.step - 1) == 0
        return young or self.step % self.every == 0

    def _read(self, before: list[tuple[Tensor, Tensor] | None]) -> None:
        groups = tuple(
            _group(i, group, spread, self.history.master, estimate_of(self.optimizer, group))
            for i, (group, spread) in enumerate(zip(self.optimizer.param_groups, before, strict=False))
        )
        if any(g.nonfinite for g in groups):
            self._note_nonfinite(skipped=False)
        self.history.muon = _muon(self.optimizer)
        moments = tuple(m for shadow in self._shadows or () for m in shadow.compare())
        losses = self._collect_losses()
        mean = sum(losses) / len(losses) if losses else None
        reading = Reading(self.step, groups, moments, mean, self._skipped)
        self.readings.append(reading)
        self._tell(reading)

    def _tell(self, reading: Reading) -> None:
        new = [f for f in find(self.history) if f.cause not in self._told]
        self._told |= {f.cause for f in new}
        for log in self._logs:
            log.write(reading, new)
        if self.out is not None:
            self.out(str(reading))
            for f in new:
                self.out(f"  {f.cause}: {f.sentence}")

    def _note_nonfinite(self, skipped: bool) -> None:
        if self.history.nonfinite and not skipped:
            return  # it is the beginning that tells
        self._collect_losses()
        if len(self.history.nonfinite) >= 100:
            return
        named = [(n, local_part(p.grad)) for n, p in _named(self.optimizer) if p.grad is not None]
        finite = (
            all(bool(torch.isfinite(local_part(p)).all()) for _, p in _named(self.optimizer)) if not skipped else True
        )
        loss = next((x for step, x in reversed(self.history.losses) if step == self.step), None)
        names = tuple(non_finite(named))
        self.history.nonfinite.append(NonFinite(self.step, names, loss, skipped, finite))

    def _collect_losses(self) -> list[float]:
        """Losses since the last reading, waited for together."""
        if not self._pending:
            return []
        steps, tensors = zip(*self._pending, strict=True)
        values = torch.stack([t.float().to(tensors[0].device) for t in tensors]).tolist()
        self._pending = []
        self.history.losses += zip(steps, values, strict=True)
        if len(self.history.losses) > LOSSES:
            self.history.losses = [*self.history.losses[: -LOSSES // 2 : 2], *self.history.losses[-LOSSES // 2 :]]
        return values


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    if isinstance(optimizer, Optimizer):
        return [(name, p) for name, p, _ in optimizer.params.entries()]
    named, index = [], 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [str(index + i) for i in range(len(group["params"]))]
        named += list(zip(names, group["params"], strict=True))
        index += len(group["params"])
    return named


def _muon(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The groups that Muon steps, ours or torch's, and how their rate is scaled."""
    groups = optimizer.param_groups
    if isinstance(optimizer, Optimizer):
        mine = [optimizer.spec.rule_of(group) == "muon" for group in groups]
    else:
        mine = [type(optimizer).__name__ == "Muon"] * len(groups)
    both = zip(groups, mine, strict=True)
    return {i: str(group.get("adjust_lr_fn") or "original") for i, (group, its) in enumerate(both) if its}


def _plan_of(optimizer: torch.optim.Optimizer) -> object:
    """What shadows are made for: spec and parameters."""
    return str(getattr(optimizer, "spec", "")), [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def _spread(group: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(weights, gradients) of a group before the step: SPREAD elements of each parameter, in their own dtype."""
    stepped = [p for p in group["params"] if p.grad is not None and local_part(p).numel()]
    if not stepped:
        return None
    return torch.cat([_strided(p.detach()) for p in stepped]), torch.cat(
        [_strided(p.grad).to(p.device) for p in stepped]  # from host memory, where it was offloaded
    )


def _strided(x: Tensor) -> Tensor:
    x = local_part(x)
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    return flat[:: max(flat.numel() // SPREAD, 1)][:SPREAD]


def _group(
    i: int, group: dict[str, Any], before: tuple[Tensor, Tensor] | None, master: str, estimate: float | None
) -> GroupReading:
    names = group.get("param_names") or [str(tuple(p.shape)) for p in group["params"]]
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    norm = float(grad_norm(group["params"]))
    lr = group.get("lr")
    rate = float(lr) if lr is not None else float("nan")
    if before is None:
        return GroupReading(i, shown, rate, norm, 0, None, None, "", estimate)
    weights, gradients = before
    stepped = [p for p in group["params"] if p.grad is not None and local_part(p).numel()]
    parts = [_strided(p.detach()) for p in stepped]
    after, touched = torch.cat(parts), gradients != 0
    alike = float((touched & (after == weights)).sum()) / max(float(touched.sum()), 1.0)
    nonfinite = 0
    if not norm < float("inf"):
        nonfinite = sum(int((~torch.isfinite(local_part(p.grad))).sum()) for p in stepped)
    ratio = _typical_ratio(weights.float(), after.float(), [len(x) for x in parts])
    return GroupReading(
        i,
        shown,
        rate,
        norm,
        nonfinite,
        ratio,
        alike if rate and master == "none" and touched.any() else None,
        str(weights.dtype).removeprefix("torch."),
        estimate,
    )


def _typical_ratio(before: Tensor, after: Tensor, sizes: list[int]) -> float | None:
    """The median over parameters of |after - before| / |before|; those that were zero have none."""
    owner = torch.repeat_interleave(torch.tensor(sizes, device=before.device))
    sums = before.new_zeros(2, len(sizes)).index_add_(1, owner, torch.stack([(after - before) ** 2, before**2]))
    moved, size = sums[0].sqrt(), sums[1].sqrt()
    ratios = (moved / size)[size > 0]
    return float(ratios.median()) if len(ratios) else None


def watch(
    optimizer: torch.optim.Optimizer,
    every: int = 100,
    *,
    log: Any = None,
    tensorboard: Any = None,
    out: Callable[[str], Any] | None = print,
) -> Watch:
    """Watch ``optimizer`` from now on: measure every ``every`` steps (and at 1, 2, 4, 8 … before the first of these),
    print one line and, when something stands out, what a person would look at.

    Per group: rate, gradient norm, update-to-weight ratio, share of the updates lost to rounding, non-finite elements;
    of the largest parameters, the error of each stored moment against a 32-bit shadow of some of its elements, which
    is stepped with the same rule on the same gradients. Adafactor, CAME, LAMB, StableAdamW and Adam-mini have no
    shadow: their steps depend on whole tensors or rows. Hand it the loss with ``watch.loss(loss)`` before each step.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        every: Steps between two measurements, >= 1.
        log: Path of a file that a line of JSON is added to for each measurement.
        tensorboard: Folder for TensorBoard's event files.
        out: Called with each line of text; None for silence.

    Returns:
        A :class:`Watch`: ``readings``, ``findings()``, ``report()``, ``loss()``, and ``close()``, which a ``with``
        block does.

    Raises:
        SpecError: for something else than an optimizer, and for ``every`` that is not allowed.
        ImportError: for ``tensorboard`` where the package is not installed.

    >>> import memopt
    >>> model = torch.nn.Linear(4, 4); opt = memopt.create(model, "adamw-8bit", lr=1e-3)
    >>> with watch(opt, out=None) as seen:
    ...     loss = model(torch.ones(1, 4)).sum(); loss.backward()
    ...     seen.loss(loss); opt.step()
    >>> seen.readings[0].step
    1
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"watch: an optimizer is needed, got a {type(optimizer).__name__}")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise SpecError(f"watch: every={every!r} is not allowed; it must be an integer >= 1")
    return Watch(optimizer, every, open_logs(log, tensorboard), out)
