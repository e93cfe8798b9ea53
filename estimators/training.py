"""How a step is trained: micro-batch, sequence, attention, checkpointing, adapters, and what goes with what."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import TYPE_CHECKING, Any, NamedTuple

from estimators.errors import InputError, shown
from estimators.models.lora import KBIT, NF4, Adapters
from estimators.parallel.degrees import DEGREES, SCHEDULES, contradictions
from estimators.units import DTYPES

if TYPE_CHECKING:
    from estimators.versions import Versions

#: ``selective`` keeps the results of matrix products and of fused attention (torch's
#: create_selective_checkpoint_contexts with those as policy); ``selective-2`` those of every second ``mm`` alone
#: (torchtitan's policy); ``every-K`` checkpoints the first layer and every K-th after it (transformers'
#: ``every_n_layers``).
CHECKPOINTINGS = ("none", "full", "selective", *(f"every-{k}" for k in range(2, 65)), "selective-2")
ATTENTIONS = ("sdpa", "flash", "eager")
MOST = {"batch": 2**16, "seq": 2**24, "accumulate": 2**16, "lora": 2**16, "bucket": 2**40, **DEGREES}
#: DeepSpeed's default reduce_bucket_size, elements.
BUCKET = 5 * 10**8


class Training(NamedTuple):
    """One step on one rank. ``seq=0``: without activations. ``lora``: rank of adapters, 0 for none. ``quantised``:
    storage of adapted weights. ``accumulate``: micro-batches per step; with more than one, gradients are there while
    the next micro-batch runs. ``device="cpu"``: no CUDA context, and no temporaries where the kernels step.
    ``release_gradients``: each parameter steps in the backward pass and frees its gradient. ``deepspeed``: DeepSpeed
    runs the step, with a bucket of so many elements (``bucket``) in which gradients are reduced. ``mixed``: products
    are in this dtype, under FSDP2 by its policy, else by torch.autocast.

    ``lora_targets``, ``lora_dtype``, ``lora_dropout``, ``lora_kind`` (``lora``, ``rslora``, ``dora``) and
    ``modules_to_save`` are PEFT's; ``kbit_prepare`` (``yes``, ``no``; empty: yes for bitsandbytes' 4 and 8 bits) its
    prepare_model_for_kbit_training. ``loss``: ``full`` logits, ``chunked`` (logits of some tokens at a time, computed
    again in the backward pass) or ``fused`` (Liger's: with gradients in the forward pass). ``outputs="kept"``: the
    model's output, logits included, lives until the backward pass is over, as in most loops written by hand.
    ``frozen`` and ``train`` are patterns of parameters' names; ``offload_activations`` moves what the layers save to
    pinned memory, ``offload_params`` weights, gradients and state of FSDP2 or DeepSpeed. ``compile`` and ``float8``:
    torch.compile of the model and torchao's float8 training. ``versions`` are those of libraries that do otherwise than
    today's (:mod:`estimators.versions`), ``alloc_conf`` is the text of PYTORCH_ALLOC_CONF.
    ``reference_model``: the frozen second model of preference training, ``same`` or another one's name or path.
    ``tp``, ``pp``, ``cp``, ``ep``: degrees of tensor, pipeline, context and expert parallelism; ``replicas`` of the
    shards (HSDP). ``schedule`` is the pipeline's; ``regather``: what tensor parallelism gathers is gathered again in
    the backward pass (Megatron-LM) and not saved (torch). ``head``: with which the model is counted
    (:mod:`estimators.heads`). ``packed``: rows of ``seq`` tokens are several sequences each."""

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
    lora_targets: str = "all-linear"
    lora_dtype: str = "fp32"
    lora_dropout: float = 0.0
    lora_kind: str = "lora"
    modules_to_save: str = ""
    kbit_prepare: str = ""
    loss: str = "full"
    outputs: str = "dropped"
    frozen: str = ""
    train: str = ""
    offload_activations: bool = False
    offload_params: bool = False
    compile: bool = False
    float8: bool = False
    versions: str = ""
    alloc_conf: str = ""
    reference_model: str = ""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    replicas: int = 1
    schedule: str = "1f1b"
    regather: bool = False
    head: str = ""
    packed: bool = False

    @property
    def kbit(self) -> bool:
        """Whether everything that is not quantised is in fp32."""
        return self.quantised in KBIT and self.kbit_prepare != "no"

    @property
    def of(self) -> "Versions":
        """The versions of libraries."""
        from estimators.versions import parsed

        return parsed(self.versions)

    @property
    def gradients_stay(self) -> bool:
        """Whether all gradients are there before the backward pass begins."""
        return self.accumulate > 1 or bool(self.versions and self.of.keeps_gradients and not self.release_gradients)

    @property
    def adapters(self) -> Adapters:
        return Adapters(
            self.lora,
            self.lora_targets,
            DTYPES[self.lora_dtype],
            self.lora_kind == "dora",
            self.modules_to_save,
            self.quantised,
            self.kbit,
        )

    def checked(self) -> "Training":
        """Raises :class:`InputError` for a value that is not allowed or does not go with another."""
        for name, most in MOST.items():
            value, least = getattr(self, name), 0 if name in ("seq", "lora") else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"{name}={shown(value)} is not allowed; it is a whole number from {least} to {most}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                listed = allowed if len(allowed) < 9 else (*allowed[:4], "…", *allowed[-2:])
                raise InputError(
                    f"{name}={shown(getattr(self, name))} is not allowed; it is one of "
                    f"{', '.join(filter(None, listed))}"
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={shown(getattr(self, name))} is not allowed; it is true or false")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={shown(getattr(self, name))} is not allowed; it is text: names, with commas")
        if self.versions:
            _ = self.of
        if self.alloc_conf:
            from estimators.allocator.alloc_conf import parsed as settings

            settings(self.alloc_conf)
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise InputError(f"lora_dropout={shown(p)} is not allowed; it is a number from 0 up to 1")
        for refused, sentence in (*self._contradictions(), *contradictions(self)):
            if refused:
                raise InputError(sentence)
        return self

    def _contradictions(self) -> "tuple[tuple[bool, str], ...]":
        t, plain = self, Training()
        of_lora = [n for n in _OF_LORA if getattr(t, n) != getattr(plain, n)]
        of_activations = [n for n in _OF_ACTIVATIONS if getattr(t, n) != getattr(plain, n)]
        listed = ", ".join(f"{n}={getattr(t, n)}" for n in of_activations)
        return (
            (
                bool(t.quantised and not t.lora),
                f"quantised={t.quantised!r} needs adapters: 4-bit weights do not train (lora=16)",
            ),
            (
                bool(of_lora and not t.lora),
                f"{of_lora[0] if of_lora else ''} says how adapters are made, and there are none (lora=16)",
            ),
            (
                bool(t.kbit_prepare and not t.quantised),
                f"kbit_prepare={t.kbit_prepare!r} is for quantised weights, and quantised is not given",
            ),
            (
                t.kbit_prepare == "yes" and t.quantised not in KBIT,
                f"kbit_prepare='yes' changes nothing with {t.quantised}: PEFT leaves its other weights as they are",
            ),
            (
                t.release_gradients and t.accumulate > 1,
                f"release_gradients does not go with accumulate={t.accumulate}: a gradient that was "
                "freed cannot be added to",
            ),
            (
                t.bucket != BUCKET and not t.deepspeed,
                f"bucket={t.bucket} is DeepSpeed's, and deepspeed is not asked for",
            ),
            (
                bool(t.mixed and t.deepspeed),
                f"mixed={t.mixed!r} does not go with deepspeed, which computes in the weights' dtype",
            ),
            (
                t.deepspeed and t.release_gradients,
                "release_gradients does not go with deepspeed, which reduces gradients by buckets",
            ),
            (bool(t.frozen and t.train), "frozen and train are two ways to say the same; give one of them"),
            (
                bool(t.lora and (t.frozen or t.train)),
                "frozen and train do not go with lora, which freezes all weights; lora_targets and modules_to_save "
                "say what trains",
            ),
            (
                t.float8 and bool(t.lora),
                "float8 does not go with lora: torchao converts torch.nn.Linear layers that train",
            ),
            (t.packed and not t.seq, "packed says what the tokens of a row are, which needs seq"),
            (
                bool(of_activations and not t.seq),
                f"{listed} changes activations, which need seq: the tokens of a sequence",
            ),
        )


CHOICES: dict[str, tuple[str, ...]] = {
    "checkpointing": CHECKPOINTINGS,
    "attention": ATTENTIONS,
    "quantised": ("", *NF4),
    "mixed": ("", "bf16", "fp16"),
    "device": ("cuda", "cpu"),
    "lora_dtype": tuple(DTYPES),
    "lora_kind": ("lora", "rslora", "dora"),
    "kbit_prepare": ("", "yes", "no"),
    "loss": ("full", "chunked", "fused"),
    "outputs": ("dropped", "kept"),
    "schedule": SCHEDULES,
}
_FLAGS = (
    "release_gradients",
    "deepspeed",
    "offload_activations",
    "offload_params",
    "compile",
    "float8",
    "regather",
    "packed",
)
_TEXTS = ("lora_targets", "modules_to_save", "frozen", "train", "versions", "alloc_conf", "reference_model", "head")
_OF_ACTIVATIONS = ("batch", "checkpointing", "accumulate", "attention", "loss", "outputs", "offload_activations")
_OF_LORA = ("lora_targets", "lora_dtype", "lora_dropout", "lora_kind", "modules_to_save")


def unknown(training: Training) -> tuple[str, ...]:
    """What a step has that no formula here knows."""
    return ("what torch.compile saves and fuses (figures are those of eager mode)",) if training.compile else ()


def describe_training(training: Training, given: bool = False) -> str:
    """The step in words, for a title. ``given``: its inputs are a caller's, who knows their shape.

    >>> describe_training(Training(2, 2048, "full"))
    '2 x 2,048 tokens, sdpa attention, full checkpointing'
    """
    parts = []
    if training.seq:
        tokens = f"{training.batch} x {training.seq:,} tokens, {training.attention} attention"
        parts.append(f"inputs that were given, of {training.batch}" if given else tokens)
        parts += ["packed"] * training.packed
        if training.checkpointing != "none":
            parts.append(f"{training.checkpointing} checkpointing")
        if training.accumulate > 1:
            parts.append(f"{training.accumulate} micro-batches per step")
    if training.release_gradients:
        parts.append("gradients released")
    if training.mixed:
        parts.append(f"computed in {training.mixed}")
    if training.reference_model:
        second = "a copy" if training.reference_model == "same" else training.reference_model
        parts.append(f"{second} as reference model")
    if training.deepspeed:
        parts.append("under DeepSpeed")
    parts += [f"{name} {value}" for name in DEGREES if (value := getattr(training, name)) > 1]
    if training.pp > 1:
        parts.append(f"schedule {training.schedule}")
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
