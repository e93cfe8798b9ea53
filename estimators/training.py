"""How a step is trained: micro-batch, sequence, attention, checkpointing, adapters; and the rows that follow."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from estimators.fields import InputError, shown
from estimators.lora import NF4, largest_quantised
from estimators.model import Model, Shape
from estimators.rows import GPU, PHASES, Row

if TYPE_CHECKING:
    from estimators.activations import Activations

#: ``selective`` keeps the results of matrix products and of fused attention (torch's
#: create_selective_checkpoint_contexts with those as policy); ``every-K`` checkpoints the first layer and every K-th
#: after it (transformers' ``every_n_layers``).
CHECKPOINTINGS = ("none", "full", "selective", *(f"every-{k}" for k in range(2, 65)))
ATTENTIONS = ("sdpa", "flash", "eager")
_MOST = {"batch": 2**16, "seq": 2**24, "accumulate": 2**16, "lora": 2**16, "bucket": 2**40}
#: DeepSpeed's default reduce_bucket_size, elements.
BUCKET = 5 * 10**8

_MIB = 2**20
#: Driver context with the kernels of torch and cuBLAS loaded, and cuBLAS's workspace (8.5 MiB before Hopper, 32 MiB on
#: it): low, expected, high. Reported by others and not measured here, so such rows are ``assumed``.
CONTEXT = (300 * _MIB, 400 * _MIB, 900 * _MIB)
#: What the caching allocator holds beyond what is asked of it, in percent of all that is allocated besides weights:
#: blocks of 512 bytes and segments of 2 MiB cost little, fragments of changing sizes more.
FRAGMENTS = (0, 2, 10)
#: NCCL's buffers for one communicator: low, expected, high. Reported by others and not measured here.
NCCL = (300 * _MIB, 600 * _MIB, 1000 * _MIB)


class Training(NamedTuple):
    """One step on one rank. ``seq=0``: without activations. ``lora``: rank of adapters, 0 for none. ``quantised``:
    storage of adapted weights. ``accumulate``: micro-batches per step; with more than one, gradients are there while
    the next micro-batch runs. ``device="cpu"``: no CUDA context, and no temporaries where the kernels step.
    ``release_gradients``: each parameter steps in the backward pass and frees its gradient. ``deepspeed``: DeepSpeed
    runs the step, with a bucket of so many elements (``bucket``) in which gradients are reduced. ``mixed``: weights are
    fp32 and products in this dtype, under FSDP2 by its policy, else by torch.autocast."""

    batch: int = 1
    seq: int = 0
    checkpointing: str = "none"
    attention: str = "sdpa"
    lora: int = 0
    quantised: str = ""
    accumulate: int = 1
    device: str = "cuda"
    release_gradients: bool = False
    deepspeed: bool = False
    bucket: int = BUCKET
    mixed: str = ""

    def checked(self) -> "Training":
        """Raises :class:`InputError` for a value that is not allowed or does not go with another."""
        for name, most in _MOST.items():
            value, least = getattr(self, name), 0 if name in ("seq", "lora") else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"{name}={shown(value)} is not allowed; it is a whole number from {least} to {most}")
        for name, allowed in (
            ("checkpointing", CHECKPOINTINGS),
            ("attention", ATTENTIONS),
            ("quantised", ("", *NF4)),
            ("mixed", ("", "bf16", "fp16")),
            ("device", ("cuda", "cpu")),
        ):
            if getattr(self, name) not in allowed:
                listed = allowed if len(allowed) < 9 else (*allowed[:4], "…", allowed[-1])
                raise InputError(
                    f"{name}={shown(getattr(self, name))} is not allowed; it is one of "
                    f"{', '.join(filter(None, listed))}"
                )
        for name in ("release_gradients", "deepspeed"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={shown(getattr(self, name))} is not allowed; it is true or false")
        if self.quantised and not self.lora:
            raise InputError(f"quantised={self.quantised!r} needs adapters: 4-bit weights do not train (lora=16)")
        if self.release_gradients and self.accumulate > 1:
            raise InputError(
                f"release_gradients does not go with accumulate={self.accumulate}: a gradient that was "
                "freed cannot be added to"
            )
        if self.bucket != BUCKET and not self.deepspeed:
            raise InputError(f"bucket={self.bucket} is DeepSpeed's, and deepspeed is not asked for")
        if self.mixed and (self.deepspeed or self.quantised):
            other = "deepspeed" if self.deepspeed else "quantised"
            raise InputError(f"mixed={self.mixed!r} does not go with {other}: the weights it is for are in float32")
        if self.deepspeed and self.release_gradients:
            raise InputError("release_gradients does not go with deepspeed, which reduces gradients by buckets")
        given = self.batch, self.checkpointing, self.accumulate, self.attention
        if not self.seq and given != (1, "none", 1, "sdpa"):
            raise InputError(
                "batch, checkpointing, accumulate and attention have an effect on activations, which need "
                "seq: tokens per sequence"
            )
        return self


def run(model: Model, training: Training, item: int, sharded: bool = False) -> "tuple[Activations | None, str]":
    """The activations of a step, or None and why they are not known. ``sharded``: FSDP2 has its own mixed precision."""
    if not training.seq:
        return None, "activations (say --seq)"
    if model.config is None:
        return None, "activations (only shapes are known; name an architecture or a config.json)"
    from estimators.activations import MIXED, NOT_SELECTIVE, Step, activations, written

    if not written(str(model.config.get("model_type"))):
        return None, f"activations (there is no formula for {model.config.get('model_type')} yet)"
    refused = NOT_SELECTIVE.get(str(model.config["model_type"])) if training.checkpointing == "selective" else None
    if refused:
        return None, f"activations (torch refuses selective checkpointing of this model: {refused})"
    autocast = bool(training.mixed) and not sharded
    if autocast and (model.config.get("model_type") not in MIXED or training.lora or training.attention == "eager"):
        what = "adapters" if training.lora else "eager attention" if training.attention == "eager" else "it"
        return None, f"activations (there is no formula for {what} under autocast yet)"
    step = Step(
        training.batch,
        training.seq,
        training.attention,
        2 if training.mixed and sharded else item,
        training.lora,
        training.device == "cpu",
        2 * autocast,
    )
    try:
        return activations(model.config, model.name, step, training.checkpointing), ""
    except KeyError as error:
        return None, f"activations (there is no formula for {error.args[0]!r} yet)"


def rows(
    name: str,
    model: Model,
    training: Training,
    ran: "Activations",
    gradients: list[tuple[str, int]],
    known: str,
    few: list[Row] | None,
) -> list[Row]:
    """Activations and gradients by phase; ``few`` are the rows of gradients that do not stay."""
    forward, loss = ran.forward.activations - ran.body_copies, ran.loss.activations - ran.copies
    held = [
        Row(name, "weights", "autocast's copies", n, GPU, (phase,), "formula")
        for phase, n in (("forward", ran.body_copies), ("loss", ran.copies))
        if n
    ]
    held += [
        Row(name, "activations", "saved, and the layer at work", forward, GPU, ("forward",), "formula"),
        Row(name, "activations", "saved, and the loss", loss, GPU, ("loss",), "formula"),
    ]
    if few is not None:
        alive = ran.accumulated.activations  # the moment that has most, whatever gradients there are
        held += few
    elif training.accumulate > 1:
        alive = ran.accumulated.activations
        held += [Row(name, "gradients", kind, n, GPU, PHASES[1:], known) for kind, n in gradients]
    else:
        alive, total = ran.backward.activations, sum(n for _, n in gradients)
        made = min(ran.backward.gradients, total)
        held.append(Row(name, "gradients", "made at that moment", made, GPU, ("backward",), "formula"))
        held += [Row(name, "gradients", kind, n, GPU, ("step",), known) for kind, n in gradients]
    held.append(Row(name, "activations", "left, and at work", alive, GPU, ("backward",), "formula"))
    decoded = 2 * largest_quantised(model)
    if decoded:
        held.append(
            Row(name, "temporaries", "one 4-bit matrix decoded", decoded, GPU, ("forward", "backward"), "formula")
        )
    return held


def one_gradient(name: str, gradients: list[tuple[str, int]], known: str) -> list[Row]:
    """Gradients that are released: those that are there at a time, in the backward pass alone."""
    return [Row(name, "gradients", f"{kind}, one at a time", n, GPU, ("backward",), known) for kind, n in gradients]


def released(model: Model, here: Model, nbytes: Callable[[str, Shape], tuple[str, int]]) -> list[tuple[str, int]]:
    """The dtype and bytes of gradients that are there at a time: the largest one. ``here`` is the model with the rows
    of this rank.

    That of an embedding which is also the head's weight waits for its other half until the end of the backward pass,
    where autograd holds both halves and their sum. FSDP2 hands over the gradients of a block together.
    """
    each = [(name, *nbytes(name, shape)) for name, shape in here.shapes if name not in here.frozen]
    if not each:
        return []
    if here is not model:
        from estimators.sharding import largest_block

        return [(max(kind for _, kind, _ in each), largest_block((name, n) for name, _, n in each))]
    shared = _tied(model)
    table = max((n for name, _, n in each if name == shared), default=0)
    most = max((3 * n if name == shared else n + table, kind) for name, kind, n in each)
    return [(most[1], most[0])]


def _tied(model: Model) -> str | None:
    """The embedding that is the head's weight too: a table of the vocabulary that is there once."""
    vocabulary = (model.config or {}).get("vocab_size")
    tables = [name for name, shape in model.shapes if len(shape) == 2 and shape[0] == vocabulary]
    return tables[0] if len(tables) == 1 else None


def runtime(name: str, rows_: list[Row], world_size: int = 1) -> list[Row]:
    """The CUDA context, NCCL's buffers where there are several ranks, and the allocator's share of what comes and
    goes."""
    low, expected, high = CONTEXT
    moving: dict[str, int] = {}
    for row in rows_:
        if row.tier == GPU and row.what not in ("weights", "buffers"):
            for phase in row.phases:
                moving[phase] = moving.get(phase, 0) + row.nbytes
    most = max(moving.values(), default=0)
    least, share, largest = (most * percent // 100 for percent in FRAGMENTS)
    nccl = Row(name, "runtime", "NCCL, one communicator", NCCL[1], GPU, PHASES, "assumed", NCCL[0], NCCL[2])
    return [
        Row(name, "runtime", "CUDA context, cuBLAS", expected, GPU, PHASES, "assumed", low, high),
        *([nccl] if world_size > 1 else []),
        Row(name, "runtime", "allocator: rounding, fragments", share, GPU, PHASES[1:], "assumed", least, largest),
    ]


def describe(training: Training) -> str:
    """The step in words, for a title.

    >>> describe(Training(2, 2048, "full"))
    '2 x 2,048 tokens, sdpa attention, full checkpointing'
    """
    parts = []
    if training.seq:
        parts.append(f"{training.batch} x {training.seq:,} tokens, {training.attention} attention")
        if training.checkpointing != "none":
            parts.append(f"{training.checkpointing} checkpointing")
        if training.accumulate > 1:
            parts.append(f"{training.accumulate} micro-batches per step")
    if training.release_gradients:
        parts.append("gradients released")
    if training.mixed:
        parts.append(f"computed in {training.mixed}")
    if training.deepspeed:
        parts.append("under DeepSpeed")
    if training.lora:
        parts.append(f"LoRA rank {training.lora}" + (f" on {training.quantised} weights" if training.quantised else ""))
    return ", ".join(parts)


#: Families with a table of learned positions -> the field with its length (and what it is in transformers, if not
#: given). ``--seq`` beyond it does not run.
_LEARNED = {
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "bert": ("max_position_embeddings", 512),
    "distilbert": ("max_position_embeddings", 512),
    "opt": ("max_position_embeddings", 2048),
    "whisper": ("max_target_positions", 448),
}
_READS = {
    "whisper": "the encoder hears 30 seconds whatever --seq says, which is the decoder's length",
    "vit": "a sequence is the patches of an image, whatever --seq says",
    "t5": "source and target are both as long as --seq says",
}


def notes(config: Any, training: Training) -> tuple[str, ...]:
    """What a sequence means for this model where that is not plain, and whether the model can take one so long."""
    if not training.seq or config is None:
        return ()
    family, found = str(config.get("model_type")), []
    if family in _READS:
        found.append(_READS[family])
    field, default = _LEARNED.get(family, ("", 0))
    positions = config.get(field, default)
    if field and isinstance(positions, int) and training.seq > positions:
        found.append(f"--seq {training.seq:,} does not run: the model has {positions:,} positions ({field})")
    return tuple(found)


def default_seq(config: Any) -> int:
    """2048 tokens, or as many as the model has positions for where that is fewer; 0 without a configuration."""
    if config is None:
        return 0
    limits = (config.get(k) for k in ("max_position_embeddings", "n_positions", "max_target_positions"))
    known = [n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return min([2048, *known])
