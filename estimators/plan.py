"""The configurations of a model that fit a card, the gentlest first."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import Any, NamedTuple

from estimators.costs import Estimate, estimate
from estimators.fields import InputError
from estimators.hardware import capacity
from estimators.model import Model, resolve
from estimators.training import default_seq

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


class Plan(NamedTuple):
    """One configuration that fits. ``level`` is the method's place in :data:`METHODS`."""

    level: int
    method: Method
    micro_batch: int
    accumulate: int
    checkpointing: str
    estimate: Estimate

    @property
    def why(self) -> str:
        parts = [self.method.why]
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} micro-batches give the same gradient in {self.accumulate} passes")
        if self.checkpointing == "full":
            parts.append("checkpointing computes every layer's forward pass twice, about a third more time")
        return "; ".join(parts)

    @property
    def cost(self) -> tuple[int, int, int]:
        return self.level, self.accumulate, int(self.checkpointing != "none")


class Plans(NamedTuple):
    """``found``: what fits and is not beaten by another in every respect, the gentlest first. The rest is about the
    gentlest: the largest micro-batch at this sequence, the longest sequence at micro-batch 1, the least number of
    ranks on which AdamW with sharded state fits (None: on no number up to 1024), and what 8 GiB more would buy."""

    model: Model
    gpu: int
    seq: int
    batch: int
    found: tuple[Plan, ...]
    largest_batch: int
    longest_seq: int
    ranks: "int | None"
    more: str


def plans(model: Any, gpu: "str | int", *, seq: int = 0, batch: int = 8) -> Plans:
    """Search over methods, checkpointing and micro-batch x accumulation (their product is ``batch``). ``seq=0`` is
    2048, or as many tokens as the model has positions for. Raises :class:`InputError`."""
    described, nbytes = resolve(model), gpu if isinstance(gpu, int) else capacity(gpu)
    seq = seq or default_seq(described.config)
    if not seq:
        raise InputError("a plan needs activations, and only shapes are known; name an architecture or a config.json")
    found = _search(described, nbytes, seq, batch)
    if not found:
        return Plans(
            described,
            nbytes,
            seq,
            batch,
            (),
            0,
            0,
            _ranks(described, nbytes, seq),
            _more(described, nbytes, seq, batch, ()),
        )
    best = found[0]

    def fits(micro: int, tokens: int) -> bool:
        return _fits(_run(described, nbytes, best.method, tokens, micro, 1, best.checkpointing))

    return Plans(
        described, nbytes, seq, batch, found,
        _largest(lambda n: fits(n, seq), _MOST_BATCH),
        _largest(lambda n: fits(1, n), _MOST_SEQ),
        _ranks(described, nbytes, seq),
        _more(described, nbytes, seq, batch, found),
    )  # fmt: skip


def _run(model: Model, gpu: int, method: Method, seq: int, micro: int, accumulate: int, checkpointing: str,
         world: int = 1) -> Estimate:  # fmt: skip
    spec = f"{method.spec}/zero1" if world > 1 else method.spec
    return estimate(model, spec, gpu=gpu, seq=seq, batch=micro, accumulate=accumulate, checkpointing=checkpointing,
                    lora=method.lora, quantised=method.quantised, world_size=world)  # fmt: skip


def _fits(e: Estimate) -> bool:
    if e.activations is None:
        raise InputError(f"a plan needs activations: without {'; '.join(e.without)}")
    return bool(e.fits)


def _search(model: Model, gpu: int, seq: int, batch: int) -> tuple[Plan, ...]:
    """For each method every micro-batch that divides the batch, with checkpointing and without; of those that fit,
    the ones that no other beats in method, passes and checkpointing at once."""
    fitting = []
    for level, method in enumerate(METHODS):
        for checkpointing in ("none", "full"):
            # The largest micro-batch that fits is the only one that is not beaten.
            for micro in (n for n in range(batch, 0, -1) if batch % n == 0):
                e = _run(model, gpu, method, seq, micro, batch // micro, checkpointing)
                if _fits(e):
                    fitting.append(Plan(level, method, micro, batch // micro, checkpointing, e))
                    break
    kept = [p for p in fitting if not any(_beats(q, p) for q in fitting)]
    return tuple(sorted(kept, key=lambda p: p.cost))


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


def _ranks(model: Model, gpu: int, seq: int) -> "int | None":
    """The least number of ranks on which 32-bit AdamW fits with its state sharded, one sequence each, checkpointed."""
    low, high = 0, 1
    while high <= _MOST_RANKS and not _fits(_run(model, gpu, METHODS[0], seq, 1, 1, "full", high)):
        low, high = high, 2 * high
    if high > _MOST_RANKS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(_run(model, gpu, METHODS[0], seq, 1, 1, "full", middle))
        low, high = (low, middle) if fits else (middle, high)
    return high


def _more(model: Model, gpu: int, seq: int, batch: int, now: tuple[Plan, ...]) -> str:
    """One sentence about a card with 8 GiB more."""
    then = _search(model, gpu + _MORE, seq, batch)
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
    checkpointing = ", checkpointing" if plan.checkpointing == "full" else ""
    return f"{kind}{plan.method.spec}, {plan.micro_batch} x {plan.accumulate}{checkpointing}"
