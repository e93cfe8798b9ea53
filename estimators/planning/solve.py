"""The inverse question: the largest batch, sequence, rank or model, or the fewest GPUs, with everything else held.

The answer fits and its neighbour does not: both are estimates of :func:`estimators.estimate` with the same options. A
card fits by what is needed at most, or by what is expected where that is accepted.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from estimators.calculator import estimate
from estimators.errors import InputError, shown
from estimators.hardware import GPUS, capacity
from estimators.memory.memory_row import RESERVED
from estimators.memory.runtime import searched
from estimators.memory.sharding import block_of
from estimators.models.from_config import from_config
from estimators.models.lora import targets
from estimators.models.model import Model
from estimators.models.positions import default_seq, positions
from estimators.models.resolve import resolve
from estimators.planning.search import fewest, most_within
from estimators.result import Estimate
from estimators.training import MOST

LARGEST = ("batch", "seq", "lora", "parameters", "layers-trained")
SMALLEST = ("gpus", "gpu")
#: Where nothing else ends a search: tokens of a model without positions, layers, GPUs.
_MOST_SEQ, _MOST_LAYERS, _MOST_GPUS = 2**20, 1024, 1024
#: Fields that say how many layers a model has.
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


class Solved(NamedTuple):
    """``value``: what was looked for; None where not even the first value fits, or no number does. ``estimate`` is that
    of the value (of the first one where none fits), ``beyond`` that of the next one, with its ``beyond_value``: None
    where the search ended for another reason, which ``end`` says. ``over``: bytes by which the next one is above the
    card's memory ``gpu``."""

    what: str
    value: "int | str | None"
    estimate: Estimate
    beyond_value: "int | str | None"
    beyond: "Estimate | None"
    gpu: int
    accept_tight: bool
    end: str = ""

    @property
    def over(self) -> int:
        e = self.beyond if self.beyond is not None else self.estimate
        return max(0, needed(e, self.accept_tight) - self.gpu)


def needed(e: Estimate, accept_tight: bool) -> int:
    """Bytes of the card that the verdict is about."""
    process = e.columns[0].process
    return process.expected if accept_tight else process.high


def solve(
    model: Any,
    gpu: "str | int" = "",
    *,
    largest: str = "",
    smallest: str = "",
    optim: Any = "adamw",
    accept_tight: bool = False,
    **options: Any,
) -> Solved:
    """One of ``largest`` (:data:`LARGEST`) and ``smallest`` (:data:`SMALLEST`), for one card.

    Args:
        model: As of :func:`estimators.estimate`; activations must be known.
        gpu: A card's name, a size or bytes; not for ``smallest="gpu"``, which asks for it.
        largest: ``"batch"``: sequences of a micro-batch; ``"seq"``: tokens of a sequence, no more than the model has
            positions; ``"lora"``: rank; ``"parameters"``: of the same model with more or fewer layers;
            ``"layers-trained"``: of the last layers, everything else frozen.
        smallest: ``"gpus"``: data-parallel ranks; ``"gpu"``: the card with the least memory among the known ones.
        optim: One spec.
        accept_tight: Whether it is enough that the expected figure fits.
        options: Keywords of :func:`estimators.estimate`, which are held; ``seq`` by default 2048.

    Returns:
        A :class:`Solved`.

    Raises:
        InputError: for a question that is none of these, or has no answer with these options.

    >>> s = solve("gpt2", "8GiB", largest="batch", seq=1024)
    >>> s.estimate.fits, s.beyond.fits, s.beyond_value - s.value
    (True, False, 1)
    """
    what = _question(largest, smallest, gpu)
    described = resolve(model)
    if not options.get("seq"):
        options["seq"] = default_seq(described.config, described.name)
    spec = optim if not isinstance(optim, (list, tuple)) else optim[0] if len(optim) == 1 else None
    if spec is None:
        raise InputError(f"solve takes one spec, and {len(optim)} were given")
    if what == "gpu":
        return _smallest_card(described, spec, accept_tight, options)
    nbytes = gpu if isinstance(gpu, int) else capacity(gpu)
    at, most, end, unit = _varied(what, described, spec, gpu, options)
    made: dict[int, Estimate] = {1: at(1)}
    _known(made[1])

    def full(n: int) -> int:
        e = made.get(n)
        if e is None:
            with searched(nbytes):
                e = at(n)
            if any(row.detail == RESERVED and row.provenance == "formula" for row in e.rows):
                made[n] = e  # nothing of it was left out
        return needed(e, accept_tight)

    @cache
    def plain(n: int) -> int:
        with searched(1):  # so small a card that nothing is replayed
            return needed(at(n), accept_tight)

    if what == "gpus":
        value, beyond = fewest(lambda n: full(n) <= nbytes, most)
    else:
        value, beyond = most_within(full, plain, nbytes, most)
    answer = value if value is not None else 1 if what != "gpus" else most
    found = Solved(
        what,
        value,
        made.get(answer) or at(answer),
        beyond,
        None,
        nbytes,
        accept_tight,
        "" if beyond or (what == "gpus" and value) else end,
    )
    found = found._replace(
        value=value * unit if value else value,
        beyond=made.get(beyond) or at(beyond) if beyond else None,
        beyond_value=beyond * unit if beyond else beyond,
    )
    if what == "parameters":
        found = found._replace(
            value=found.estimate.parameters if value else None,
            beyond_value=found.beyond.parameters if found.beyond else None,
        )
    return found


def _question(largest: str, smallest: str, gpu: "str | int") -> str:
    if bool(largest) == bool(smallest):
        raise InputError("solve answers one question: largest or smallest, one of them")
    what, allowed = (largest, LARGEST) if largest else (smallest, SMALLEST)
    if what not in allowed:
        name = "largest" if largest else "smallest"
        raise InputError(f"{name}={shown(what)} is not allowed; it is one of {', '.join(allowed)}")
    if (what == "gpu") == bool(gpu):
        raise InputError(
            "smallest gpu asks which card; leave out gpu" if gpu else f"which card? {what} needs gpu: a name or a size"
        )
    return what


def _known(e: Estimate) -> None:
    if e.activations is None or e.columns[0].without:
        raise InputError(f"there is no answer without {'; '.join(e.columns[0].without)}")


def _fits(e: Estimate, nbytes: int, accept_tight: bool) -> bool:
    return e.columns[0].verdict(nbytes) in (("FITS", "TIGHT") if accept_tight else ("FITS",))


def _varied(
    what: str, model: Model, spec: Any, gpu: "str | int", options: "dict[str, Any]"
) -> "tuple[Callable[[int], Estimate], int, str, int]":
    """The estimate at a value, the largest value, why it ends there, and of what the value is the number: of GPUs as
    many as share one model, of tokens as many as ranks that share a sequence."""
    keyword = {"batch": "batch", "seq": "seq", "lora": "lora", "gpus": "world_size"}.get(what, "")
    if keyword == "world_size" and "/" not in str(spec):
        raise InputError(
            f"'{spec}': no number of GPUs changes what one of them holds; name a spec with /zero1, /zero2 or /zero3"
        )
    if keyword:
        held = {k: v for k, v in options.items() if k != keyword}

        split = options.get("tp", 1) * options.get("cp", 1)
        unit = {"seq": split, "gpus": split * options.get("pp", 1)}.get(what, 1)

        def at(n: int) -> Estimate:
            given: dict[str, Any] = {**held, keyword: n * unit if what == "seq" else n}
            return estimate(model, spec, gpu=gpu, **given)

        most, end = MOST.get(what, 2**16), "more is not allowed"
        if what == "seq":
            named = positions(model.config, model.name)
            most, end = named or _MOST_SEQ, f"the model has {named:,} positions" if named else "more is not looked for"
        if what == "lora":
            sides = [min(shape) for _, shape in targets(model, options.get("lora_targets", "all-linear"))]
            most, end = min(sides), f"a matrix has {min(sides):,} rows or columns"
        if what == "gpus":
            most, end = _MOST_GPUS, "more is not looked for"
        return at, most // unit if what == "seq" else most, end, unit
    variants = _depths(model) if what == "parameters" else _trained(model)
    most, end = (_MOST_LAYERS, "more is not looked for") if what == "parameters" else _all_layers(model)
    known: dict[int, Model] = {}

    def of_model(n: int) -> Estimate:
        if n not in known:
            known[n] = variants(n)
        return estimate(known[n], spec, gpu=gpu, **options)

    return of_model, most, end, 1


def _depths(model: Model) -> Callable[[int], Model]:
    """The model with so many layers."""
    config = model.config
    fields = [field for field in _DEPTH if config and isinstance(config.get(field), int)]
    if config is None or not fields or model.dtypes:
        raise InputError("the largest number of parameters needs a configuration whose layers can be counted")
    also = {"num_layers": "num_decoder_layers", "decoder_layers": "encoder_layers"}.get(fields[0])

    def of(n: int) -> Model:
        deeper = {**config, fields[0]: n, **({also: n} if also and config.get(also) else {})}
        return from_config(deeper, model.name)

    return of


def _blocks(model: Model) -> "list[str]":
    return list(dict.fromkeys(filter(None, (block_of(name) for name, _ in model.shapes))))


def _all_layers(model: Model) -> "tuple[int, str]":
    count = len(_blocks(model))
    return count, f"the model has {count} layers"


def _trained(model: Model) -> Callable[[int], Model]:
    """The model of which the last so many layers train."""
    blocks = _blocks(model)
    if not blocks:
        raise InputError(f"{model.name} has no layers that could be told apart")

    def of(n: int) -> Model:
        last = set(blocks[-n:])
        return model._replace(frozen=frozenset(name for name, _ in model.shapes if block_of(name) not in last))

    return of


def _smallest_card(model: Model, spec: Any, accept_tight: bool, options: "dict[str, Any]") -> Solved:
    """Cards by their memory, from what is allocated at least on."""
    least = estimate(model, spec, **options)
    _known(least)
    allocated = least.columns[0].peak.nbytes
    before = last = ""
    for mib, card in sorted((mib, card) for card, mib in GPUS.items()):
        before, last = last, card
        if mib * 2**20 < allocated:
            continue
        with searched(mib * 2**20):
            e = estimate(model, spec, gpu=card, **options)
        if _fits(e, mib * 2**20, accept_tight):
            full = estimate(model, spec, gpu=before, **options) if before else None
            size = full.gpu if full is not None and full.gpu else mib * 2**20
            return Solved("gpu", card, e, before or None, full, size, accept_tight)
    full = estimate(model, spec, gpu=last, **options)
    return Solved("gpu", None, full, None, None, GPUS[last] * 2**20, accept_tight, f"{last} is the largest known card")
