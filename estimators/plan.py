"""The configurations of a model that fit a card, the gentlest first."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import Any, NamedTuple

from estimators.costs import Estimate, estimate
from estimators.fields import InputError, shown
from estimators.hardware import capacity
from estimators.model import Model, resolve
from estimators.training import Training, default_seq

#: Adapters are tried with this rank, the one most examples of PEFT and QLoRA use.
RANK = 16
_MORE = 8 * 2**30
_MOST_BATCH, _MOST_SEQ, _MOST_RANKS = 4096, 2**20, 1024


class Method(NamedTuple):
    """What is given up, from nothing on: a spec, adapters, and one sentence."""

    spec: str
    why: str
    lora: int = 0
    quantised: str = ""


#: In the order of what they cost in quality, then in speed.
METHODS = (
    Method("adamw", "nothing is given up: AdamW with 32-bit state"),
    Method("adamw-8bit", "state in 8 bits: a quarter of its size"),
    Method("adamw-8bit@paged", "8-bit state that moves to the host while the card is full: slower when it does"),
    Method("adafactor", "factored second moment, no first moment: another update rule, rates need a look"),
    Method("adamw-4bit", "state in 4 bits: an eighth of its size, noisier updates"),
    Method("adamw", "adapters of rank 16 train, the weights do not: less can be learnt", RANK),
    Method("adamw-8bit@paged", "adapters on 4-bit weights (QLoRA): the weights are rounded too", RANK, "nf4-double"),
)


#: Partition -> what it costs, from the least communication on; tried where there are several GPUs.
SHARDINGS = {
    "": "",
    "zero1": "state is sharded, and updated rows are gathered after the step",
    "zero2": "weights, gradients and state are sharded (FSDP2): weights are gathered once in every pass, and held",
    "zero3": "weights, gradients and state are sharded (FSDP2): weights are gathered twice in every pass",
}

#: Checkpointing -> what it costs, from the least on.
CHECKPOINTINGS = {
    "none": "",
    "selective": "selective checkpointing keeps results of matrix products and attention and computes the rest twice",
    "full": "checkpointing computes every layer's forward pass twice, about a third more time",
}


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
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} micro-batches give the same gradient in {self.accumulate} passes")
        return "; ".join([*parts, *filter(None, [CHECKPOINTINGS[self.checkpointing]])])

    @property
    def cost(self) -> tuple[int, int, int, int]:
        return (
            self.level,
            list(SHARDINGS).index(self.sharding),
            self.accumulate,
            list(CHECKPOINTINGS).index(self.checkpointing),
        )


class Plans(NamedTuple):
    """``found``: what fits and is not beaten by another in every respect, the gentlest first. The rest is about the
    gentlest: the largest micro-batch at this sequence, the longest sequence at micro-batch 1, the least number of
    ranks on which AdamW fits with sharded state (``ranks``) and with everything sharded (``ranks_zero3``; None: on no
    number up to 1024), and what 8 GiB more would buy. ``gpus``: cards that there are."""

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


def plans(model: Any, gpu: "str | int", *, seq: int = 0, batch: int = 8, gpus: int = 1) -> Plans:
    """Search over methods, sharding over ``gpus`` cards, checkpointing and micro-batch x accumulation (their product is
    ``batch``, sequences per step and card). ``seq=0`` is 2048, or as many tokens as the model has positions for.
    Raises :class:`InputError`."""
    described, nbytes = resolve(model), gpu if isinstance(gpu, int) else capacity(gpu)
    seq = seq or default_seq(described.config)
    if not seq:
        raise InputError("a plan needs activations, and only shapes are known; name an architecture or a config.json")
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= _MOST_RANKS:
        raise InputError(f"gpus={shown(gpus)} is not allowed; it is from 1 to {_MOST_RANKS}")
    Training(batch, seq).checked()
    run = _Runs(described, nbytes)
    found = _search(run, nbytes, seq, batch, gpus)
    largest = longest = 0
    if found:
        best = found[0]

        def fits(micro: int, tokens: int) -> bool:
            return _fits(run(best.method, tokens, micro, 1, best.checkpointing, gpus, best.sharding), nbytes)

        largest = _largest(lambda n: fits(n, seq), _MOST_BATCH)
        longest = _largest(lambda n: fits(1, n), _MOST_SEQ)
    return Plans(
        described,
        nbytes,
        seq,
        batch,
        found,
        largest,
        longest,
        _ranks(run, nbytes, seq, "zero1"),
        _more(run, nbytes, seq, batch, gpus, found),
        _ranks(run, nbytes, seq, "zero3"),
        gpus,
    )


def _sharded(method: Method, sharding: str) -> str:
    return f"{method.spec}/{sharding}" if sharding else method.spec


class _Runs:
    """Estimates of one model for one card, each made once: what a run needs does not depend on the card."""

    def __init__(self, model: Model, gpu: int) -> None:
        self._model, self._gpu = model, gpu
        self._known: dict[tuple[Any, ...], Estimate] = {}

    def __call__(
        self, method: Method, seq: int, micro: int, accumulate: int, checkpointing: str, world: int, sharding: str
    ) -> Estimate:
        key = (method, seq, micro, accumulate, checkpointing, world, sharding)
        if key not in self._known:
            self._known[key] = estimate(
                self._model,
                _sharded(method, sharding),
                gpu=self._gpu,
                seq=seq,
                batch=micro,
                accumulate=accumulate,
                checkpointing=checkpointing,
                lora=method.lora,
                quantised=method.quantised,
                world_size=world,
            )
        return self._known[key]


def _fits(e: Estimate, gpu: int) -> bool:
    if e.activations is None:
        raise InputError(f"a plan needs activations: without {'; '.join(e.without)}")
    return e.peak.nbytes <= gpu


def _search(run: _Runs, gpu: int, seq: int, batch: int, gpus: int) -> tuple[Plan, ...]:
    """For each method and sharding every micro-batch that divides the batch, with checkpointing and without; of those
    that fit, the ones that no other beats in method, sharding, passes and checkpointing at once."""
    tried = [
        _largest_micro_batch(run, gpu, seq, batch, gpus, level, sharding, checkpointing)
        for level, method in enumerate(METHODS)
        for sharding in _shardings(method, gpus)
        for checkpointing in CHECKPOINTINGS
    ]
    fitting = [p for p in tried if p is not None]
    kept = [p for p in fitting if not any(_beats(q, p) for q in fitting)]
    return tuple(sorted(kept, key=lambda p: p.cost))


def _largest_micro_batch(
    run: _Runs, gpu: int, seq: int, batch: int, gpus: int, level: int, sharding: str, checkpointing: str
) -> Plan | None:
    """The plan with the largest micro-batch that fits; one with a smaller is beaten by it."""
    method = METHODS[level]

    def at(micro: int) -> Estimate:
        return run(method, seq, micro, batch // micro, checkpointing, gpus, sharding)

    if checkpointing == "selective" and at(1).activations is None:
        return None  # torch refuses it for this family
    micro = _largest_divisor(batch, lambda n: _fits(at(n), gpu))
    return Plan(level, method, micro, batch // micro, checkpointing, at(micro), sharding) if micro else None


def _largest_divisor(n: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of n that fits, or 0. Gradients stay between the micro-batches of a step, so the whole may
    fit where a smaller one does not; of the others a smaller one needs less."""
    whole, *divisors = (d for d in range(n, 0, -1) if n % d == 0)
    if fits(whole):
        return whole
    if not divisors or not fits(1):
        return 0
    return next(d for d in divisors if fits(d))


def _shardings(method: Method, gpus: int) -> tuple[str, ...]:
    """FSDP2 does not cut 4-bit weights by rows."""
    return ("",) if gpus == 1 else tuple(s for s in SHARDINGS if s in ("", "zero1") or not method.quantised)


def _beats(q: Plan, p: Plan) -> bool:
    return q is not p and all(a <= b for a, b in zip(q.cost, p.cost, strict=True))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n that fits, by doubling and halving; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= most and fits(middle) else (low, middle)
    return low


def _ranks(run: _Runs, gpu: int, seq: int, sharding: str) -> "int | None":
    """The least number of ranks on which 32-bit AdamW fits sharded so, one sequence each, checkpointed."""

    def fits(ranks: int) -> bool:
        cut = sharding if ranks > 1 else ""
        return _fits(run(METHODS[0], seq, 1, 1, "full", ranks, cut), gpu)

    low, high = 0, 1
    while high <= _MOST_RANKS and not fits(high):
        low, high = high, 2 * high
    if high > _MOST_RANKS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


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
    kind = "QLoRA, " if plan.method.quantised else "LoRA, " if plan.method.lora else ""
    kinds = {"none": "", "selective": ", selective checkpointing", "full": ", checkpointing"}
    checkpointing = kinds[plan.checkpointing]
    return f"{kind}{plan.spec}, {plan.micro_batch} x {plan.accumulate}{checkpointing}"
