"""The configurations of a model that fit a card, the gentlest first."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from estimators.calculator import estimate
from estimators.errors import InputError, shown
from estimators.hardware import capacity
from estimators.memory.runtime import searched
from estimators.models.model import Model
from estimators.models.positions import default_seq, positions
from estimators.models.resolve import resolve
from estimators.planning.methods import CHECKPOINTINGS, METHODS, SHARDINGS, Method, asked_for
from estimators.planning.search import largest, largest_divisor
from estimators.result import Estimate
from estimators.units import gib
from memopt.core.hyperparameters import SpecError

__all__ = ["CHECKPOINTINGS", "METHODS", "SHARDINGS", "Method", "Plan", "Plans", "plans", "title"]

_MORE = 8 * 2**30
_MOST_BATCH, _MOST_SEQ, _MOST_RANKS = 4096, 2**20, 1024


class Plan(NamedTuple):
    """One configuration that fits. ``level`` is the method's place in :data:`METHODS`."""

    level: int
    method: Method
    micro_batch: int
    accumulate: int
    checkpointing: str
    estimate: Estimate
    sharding: str = ""

    @property
    def spec(self) -> str:
        return _sharded(self.method, self.sharding)

    @property
    def why(self) -> str:
        parts = [part for part in (self.method.why, SHARDINGS[self.sharding]) if part]
        host = self.estimate.peak.host
        if host >= 2**20:
            parts.append(f"{gib(host)} of host memory")
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} micro-batches give the same gradient in {self.accumulate} passes")
        return "; ".join([*parts, *filter(None, [CHECKPOINTINGS.get(self.checkpointing, "")])])

    @property
    def cost(self) -> tuple[int, int, int, int]:
        return (
            self.level,
            list(SHARDINGS).index(self.sharding),
            self.accumulate,
            list(CHECKPOINTINGS).index(self.checkpointing) if self.checkpointing in CHECKPOINTINGS else 0,
        )


class Plans(NamedTuple):
    """``found``: what fits and is not beaten by another in every respect, the gentlest first. The rest is about the
    gentlest: the largest micro-batch at this sequence, the longest sequence at micro-batch 1, the least number of
    ranks on which AdamW fits with sharded state (``ranks``) and with everything sharded (``ranks_zero3``; None: on no
    number up to 1024), and what 8 GiB more would buy. ``gpus``: cards that there are, ``data_parallel`` of them ranks
    with a batch of their own, where tensor, pipeline or context parallelism is held."""

    model: Model
    gpu: int
    seq: int
    batch: int
    found: tuple[Plan, ...]
    largest_batch: int
    longest_seq: int
    ranks: "int | None"
    more: str
    ranks_zero3: "int | None" = None
    gpus: int = 1
    data_parallel: int = 1


def plans(
    model: Any,
    gpu: "str | int",
    *,
    seq: int = 0,
    batch: int = 8,
    gpus: int = 1,
    optim: Sequence[Any] = (),
    **options: Any,
) -> Plans:
    """Search over methods, sharding over ``gpus`` cards, checkpointing and micro-batch x accumulation (their product is
    ``batch``, sequences per step and card). ``seq=0`` is 2048, or as many tokens as the model has positions for.

    ``options`` are keywords of :func:`estimators.estimate`, which hold for all that is tried; ``optim`` are specs to
    try in place of :data:`METHODS`. Raises :class:`InputError`.
    """
    described, nbytes = resolve(model), gpu if isinstance(gpu, int) else capacity(gpu)
    seq = seq or default_seq(described.config, described.name)
    if not seq:
        raise InputError("a plan needs activations, and only shapes are known; name an architecture or a config.json")
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= _MOST_RANKS:
        raise InputError(f"gpus={shown(gpus)} is not allowed; it is from 1 to {_MOST_RANKS}")
    most = positions(described.config, described.name)
    if most and seq > most:
        raise InputError(f"seq={seq} is not allowed: the model has {most} positions")
    # Refuses what contradicts itself before anything is tried.
    stages, split = options.get("pp", 1), options.get("tp", 1) * options.get("cp", 1)
    ranks, left = divmod(gpus, stages * split)
    if left:
        raise InputError(f"gpus={gpus} is not a multiple of tp x pp x cp, {stages * split}")
    again = {} if "accumulate" in options else {"accumulate": stages}
    estimate(
        described, optim or METHODS[0].spec, gpu=gpu, seq=seq, world_size=ranks, **{"batch": batch, **options, **again}
    )
    run = _Runs(described, gpu, options, asked_for(optim, options))
    found = _search(run, nbytes, seq, batch, ranks)
    most_sequences = longest = 0
    if found:
        best = found[0]

        def fits(micro: int, tokens: int) -> bool:
            tokens = max(split, tokens - tokens % split)
            return _fits(run(best.method, tokens, micro, stages, best.checkpointing, ranks, best.sharding), nbytes)

        most_sequences = largest(lambda n: fits(n, seq), _MOST_BATCH)
        longest = largest(lambda n: fits(1, n), most or _MOST_SEQ)
    return Plans(
        described,
        nbytes,
        seq,
        batch,
        found,
        most_sequences,
        longest,
        _cards(run, nbytes, seq, batch, "zero1"),
        _more(run, nbytes, seq, batch, ranks, found),
        _cards(run, nbytes, seq, batch, "zero3"),
        gpus,
        ranks,
    )


def _sharded(method: Method, sharding: str) -> str:
    return f"{method.spec}/{sharding}" if sharding else method.spec


class _Runs:
    """Estimates of one model for one card, each made once. ``options`` hold for all; ``methods`` are what is tried."""

    def __init__(
        self,
        model: Model,
        gpu: "str | int",
        options: Mapping[str, Any] | None = None,
        methods: Sequence[Method] = METHODS,
    ) -> None:
        self._model, self._gpu = model, gpu
        self.options, self.methods = dict(options or {}), tuple(methods)
        self._known: dict[tuple[Any, ...], Estimate] = {}

    def __call__(
        self, method: Method, seq: int, micro: int, accumulate: int, checkpointing: str, world: int, sharding: str
    ) -> Estimate:
        key = (method, seq, micro, accumulate, checkpointing, world, sharding)
        if key not in self._known:
            given = {
                "checkpointing": checkpointing,
                "lora": method.lora,
                "quantised": method.quantised,
                "release_gradients": method.release,
            }
            told = {"offload_gradients": True} if method.offload_gradients else {}
            options = {**self.options, **given, **told, "batch": micro, "accumulate": accumulate}
            with searched(capacity(self._gpu) if isinstance(self._gpu, str) else self._gpu):
                self._known[key] = estimate(
                    self._model, _sharded(method, sharding), gpu=self._gpu, seq=seq, world_size=world, **options
                )
        return self._known[key]

    @property
    def checkpointings(self) -> tuple[str, ...]:
        return (self.options["checkpointing"],) if "checkpointing" in self.options else tuple(CHECKPOINTINGS)


def _fits(e: Estimate, gpu: int) -> bool:
    """At most, so that a plan leaves what is not certain free."""
    if e.activations is None:
        raise InputError(f"a plan needs activations: without {'; '.join(e.without)}")
    return e.columns[0].verdict(gpu) == "FITS"


def _search(run: _Runs, gpu: int, seq: int, batch: int, gpus: int) -> tuple[Plan, ...]:
    """For each method and sharding every micro-batch that divides the batch, with checkpointing and without; of those
    that fit, the ones that no other beats in method, sharding, passes and checkpointing at once."""
    tried = [
        _largest_micro_batch(run, gpu, seq, batch, gpus, level, sharding, checkpointing)
        for level, method in enumerate(run.methods)
        for sharding in _shardings(method, gpus)
        for checkpointing in run.checkpointings
    ]
    fitting = [p for p in tried if p is not None]
    kept = [p for p in fitting if not any(_beats(q, p) for q in fitting)]
    return tuple(sorted(kept, key=lambda p: p.cost))


def _largest_micro_batch(
    run: _Runs, gpu: int, seq: int, batch: int, gpus: int, level: int, sharding: str, checkpointing: str
) -> Plan | None:
    """The plan with the largest micro-batch that fits; one with a smaller is beaten by it."""
    method, stages = run.methods[level], run.options.get("pp", 1)
    held = run.options.get("accumulate", 1 if method.release else 0)

    def at(micro: int) -> Estimate:
        return run(method, seq, micro, batch // micro, checkpointing, gpus, sharding)

    if batch < stages:
        return None
    try:
        if checkpointing == "selective" and at(batch // stages).activations is None:
            return None  # torch refuses it for this family
        if held:
            micro = batch // held if batch % held == 0 and _fits(at(batch // held), gpu) else 0
        else:
            micro = largest_divisor(batch, lambda n: batch // n >= stages and _fits(at(n), gpu))
    except SpecError:
        return None  # a placement that does not go with this partition, or a format with an option
    return Plan(level, method, micro, batch // micro, checkpointing, at(micro), sharding) if micro else None


def _shardings(method: Method, gpus: int) -> tuple[str, ...]:
    """FSDP2 does not cut 4-bit weights by rows. A gradient that was released is not there to be reduced, unless FSDP2
    does it; gradients that are offloaded are those of one rank."""
    if gpus == 1:
        return ("",)
    if method.offload_gradients or "/" in method.spec:
        return ("",) if "/" in method.spec else ()
    if method.release:
        return ("zero2", "zero3")
    return tuple(s for s in SHARDINGS if s in ("", "zero1") or not method.quantised)


def _beats(q: Plan, p: Plan) -> bool:
    return q is not p and all(a <= b for a, b in zip(q.cost, p.cost, strict=True))


def _cards(run: _Runs, gpu: int, seq: int, batch: int, sharding: str) -> "int | None":
    """The least number of cards on which 32-bit AdamW fits sharded so, one sequence at a time, checkpointed."""
    method = METHODS[0]._replace(lora=run.options.get("lora", 0), quantised=run.options.get("quantised", ""))
    if sharding == "zero3" and method.quantised:
        return None

    stages = run.options.get("pp", 1)
    each = stages * run.options.get("tp", 1) * run.options.get("cp", 1)

    def fits(ranks: int) -> bool:
        cut = sharding if ranks > 1 else ""
        return _fits(run(method, seq, 1, max(batch, stages), "full", ranks, cut), gpu)

    low, high = 0, 1
    while high <= _MOST_RANKS and not fits(high):
        low, high = high, 2 * high
    if high > _MOST_RANKS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return int(high * each)


def _more(run: _Runs, gpu: int, seq: int, batch: int, gpus: int, now: tuple[Plan, ...]) -> str:
    """One sentence about a card with 8 GiB more."""
    then = _search(run, gpu + _MORE, seq, batch, gpus)
    if not then:
        return "nothing that fits either"
    best = then[0]
    if not now:
        return f"{title(best)}, where now nothing fits"
    if best.cost == now[0].cost:
        return "the same plan, with more room"
    return f"{title(best)} in place of {title(now[0])}"


def title(plan: Plan) -> str:
    """A configuration in a few words."""
    method = plan.method
    kind = "QLoRA, " if method.quantised else "LoRA, " if method.lora else ""
    kinds = {"none": "", "full": ", checkpointing"}
    checkpointing = kinds.get(plan.checkpointing, f", {plan.checkpointing} checkpointing")
    gradients = ", gradients released" * method.release + ", gradients offloaded" * method.offload_gradients
    return f"{kind}{plan.spec}{gradients}, {plan.micro_batch} x {plan.accumulate}{checkpointing}"
