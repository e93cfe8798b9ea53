"""What torch's allocator reserves beyond what is allocated, from a replay of the first steps.

Rows say how many bytes there are of a kind; a replay needs them tensor by tensor and in order. Weights come one by one,
as a model is loaded: 4-bit ones after the 16-bit tensor that they are made of, what k-bit preparation turns
to fp32 twice, adapters last. State comes with the first step, in a tensor per parameter and moment. Where a rank holds
less than whole tensors, each is scaled.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from estimators.allocator.alloc_conf import DEFAULT, MIB, Settings
from estimators.memory.memory_row import GPU, PHASES, WORKSPACES, Row
from estimators.models.lora import NF4
from estimators.models.model import Model
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations
    from estimators.allocator.replayed_step import Held

#: Bytes of one bucket of DistributedDataParallel (bucket_cap_mb).
_BUCKET = 25 * MIB
#: Names of PEFT's parameters, which are made when the model is there.
_ADDED = (".lora_", ".modules_to_save.")
#: A tensor in 16 bits that is quantised, and how many of them are loaded ahead by transformers' threads: fitted to the
#: runs of benchmarks/measured/t4_lora.csv, where 12 to 24 do equally well.
_PASSING, AHEAD = "16 bits", 16
#: bitsandbytes' table of the sixteen values, which each weight has.
_CODE = 64
_ITEM = {"float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


class Overhead(NamedTuple):
    """``requested``: the most that was asked for at once. ``rounding``: by how much blocks are larger than that, which
    counts as allocated. ``reserved``: all that is reserved. ``block``: the largest tensor that a layer makes."""

    requested: int
    rounding: int
    reserved: int
    block: int


def overhead(
    rows: Sequence[Row],
    model: Model,
    training: Training,
    ran: "Activations",
    settings: Settings = DEFAULT,
) -> Overhead:
    """Of one rank, whose ``rows`` are those without the runtime's."""
    from estimators.allocator.replay import replayed

    found = replayed(ran, held(rows, model, training), settings)
    tapes = ran.flown.chunks if ran.flown else [ran.walked] if ran.walked else []
    layers = [s.tape.ops for tape in tapes for s in tape.segments if s.kind == "layer"]
    block = max((op.out.nbytes for ops in layers for op in ops), default=ran.recorded.largest if ran.recorded else 0)
    return Overhead(found.requested, max(0, found.allocated - found.requested), found.reserved, block)


def held(rows: Sequence[Row], model: Model, training: Training) -> "Held":
    """What is allocated besides the tape."""
    from estimators.allocator.replayed_step import Held

    on_gpu = [r for r in rows if r.tier == GPU]
    weights = sum(r.nbytes for r in on_gpu if r.what == "weights" and r.phases == PHASES)
    trainable = [prod(shape) for name, shape in model.shapes if name not in model.frozen]
    state = [r.nbytes for r in on_gpu if r.what == "state"]
    step = [r for r in on_gpu if r.what == "temporaries" and r.phases == ("step",)]
    sharded = training.deepspeed or any(r.detail.startswith("gathered") for r in on_gpu)
    whole: list[int] = []
    for r in on_gpu:
        if r.detail == WORKSPACES:
            whole += [r.nbytes // 2] * 2
        elif "buckets" in r.detail:
            whole += _pieces(r.nbytes, _BUCKET)
        elif r.what == "gradients" and sharded and ("step" in r.phases or training.pp > 1):
            whole += _split(r.nbytes, trainable)
        elif r.what == "buffers" or "gathered" in r.detail or (r.what == "temporaries" and r not in step):
            whole.append(r.nbytes)
    kept = any(r.what == "gradients" and "step" in r.phases for r in on_gpu)
    return Held(
        _loaded(model, training, weights),
        [n for nbytes in state for n in _split(nbytes, trainable)],
        [n for r in step for n in (_split(r.nbytes, trainable) if "foreach" in r.detail else [r.nbytes])],
        whole,
        1 + training.gradients_stay,
        sharded or training.release_gradients or not kept,
    )


def _split(nbytes: int, numels: Sequence[int]) -> list[int]:
    """As tensors of so many elements each have them."""
    total = max(1, sum(numels))
    return [nbytes * numel // total for numel in numels]


def _pieces(nbytes: int, most: int) -> list[int]:
    return [most] * (nbytes // most) + [nbytes % most]


def _loaded(model: Model, training: Training, nbytes: int) -> list[tuple[object, int]]:
    """What comes and goes while the model is loaded, prepared and given its adapters: ``nbytes`` in the end. 4-bit and
    8-bit weights are loaded as transformers 5 does it: some tensors are there in 16 bits ahead of the one that is
    quantised."""
    events: list[tuple[object, int]] = []
    ahead: list[tuple[str, int, str]] = []
    then: list[tuple[object, int]] = []
    bits = bool(training.quantised)

    def stored(name: str, numel: int, kind: str) -> None:
        if kind in NF4:
            data = int(numel * min(1.0, NF4[kind] // 0.5 / 2))
            scales = int(numel * NF4[kind]) - data
            events.extend([(name, data), ((name, "scales"), scales), ((name, "code"), _CODE * kind.startswith("nf4"))])
            events.append(((name, _PASSING), 0))
        elif kind == "float32" and training.kbit:
            then.extend([(name, 4 * numel), ((name, _PASSING), 0)])
        else:
            events.extend([(name, numel * _ITEM.get(kind, 2)), ((name, _PASSING), 0)])

    for name, shape in model.shapes:
        kind, numel = model.dtypes.get(name, "bfloat16"), prod(shape)
        if any(part in name for part in _ADDED):
            then.append((name, numel * _ITEM.get(kind, 2)))
        elif not bits:
            events.append((name, numel * _ITEM.get(kind, 2)))
        else:
            events.append(((name, _PASSING), 2 * numel))
            ahead.append((name, numel, kind))
            if len(ahead) > AHEAD:
                stored(*ahead.pop(0))
    for one in ahead:
        stored(*one)
    events += then
    stays = sum(n for key, n in events if not (isinstance(key, tuple) and key[1] == _PASSING))
    if abs(stays - nbytes) > nbytes // 100:  # a rank's share
        return [(key, n * nbytes // max(1, stays)) for key, n in events]
    return events
