"""The estimate: rows of bytes for each of some specs."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estimators.columns import ColumnRequest, columns
from estimators.errors import InputError, shown
from estimators.hardware import capacity
from estimators.heads import with_head
from estimators.models.model import Model
from estimators.models.resolve import resolve
from estimators.result import Estimate
from estimators.trained import as_trained
from estimators.training import BUCKET, Training
from estimators.units import dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memopt.keywords import SpecKeywords
    from memopt.spec import OptimSpec

__all__ = ["estimate"]

_MAX_WORLD_SIZE = 10**6


def estimate(
    model: Any,
    spec: "str | OptimSpec | Sequence[str | OptimSpec]" = "adamw-8bit",
    *,
    gpu: str | int | None = None,
    weights: str | None = None,
    gradients: str | None = None,
    world_size: int = 1,
    batch: int = 1,
    seq: int = 0,
    checkpointing: str = "none",
    attention: str = "sdpa",
    lora: int = 0,
    quantised: str = "",
    accumulate: int = 1,
    device: str = "cuda",
    release_gradients: bool = False,
    deepspeed: bool = False,
    bucket: int = BUCKET,
    mixed: str = "",
    lora_targets: str = "all-linear",
    lora_dtype: str = "fp32",
    lora_dropout: float = 0.0,
    lora_kind: str = "lora",
    modules_to_save: str = "",
    kbit_prepare: str = "",
    loss: str = "full",
    outputs: str = "dropped",
    frozen: str = "",
    train: str = "",
    offload_activations: bool = False,
    offload_params: bool = False,
    compile: bool = False,
    float8: bool = False,
    versions: str = "",
    alloc_conf: str = "",
    reference_model: str = "",
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    replicas: int = 1,
    schedule: str = "1f1b",
    regather: bool = False,
    head: str = "",
    packed: bool = False,
    inputs: Any = None,
    **fields: "Unpack[SpecKeywords]",
) -> Estimate:
    """What one rank needs to train ``model`` with one spec or with each of several; does not import torch.

    Args:
        model: A parameter count (``8_000_000_000``, ``"8B"``), the name of a built-in architecture, the path of a
            config.json, of a folder that holds one or of safetensors files, a configuration as a mapping, or a
            ``torch.nn.Module`` (also on the meta device).
        spec: A spec as of :func:`memopt.create`, or several, which become the columns of a table.
        gpu: A card's name, a size (``"24GiB"``) or bytes; None asks only what is needed.
        weights: Their dtype, torch's name; default a module's or file's own, else bfloat16.
        gradients: Theirs; default as the weights.
        world_size: Number of data-parallel ranks; figures are those of the fullest one.
        batch: Sequences in one micro-batch on one rank.
        seq: Tokens in a sequence; 0 counts weights, gradients and state only, no activations.
        checkpointing: Activation checkpointing: ``"none"``, ``"full"``, ``"selective"`` or ``"every-K"`` blocks.
        attention: ``"sdpa"``, ``"flash"`` or ``"eager"``.
        lora: Rank of adapters, PEFT's LoRA; 0 trains the model itself.
        quantised: Storage of the linear layers' weights under adapters, ``"nf4"``, ``"nf4-double"``, ``"int8"`` or
            ``"gptq"``; ``""`` keeps their dtype.
        accumulate: Micro-batches in one step.
        device: ``"cuda"`` or ``"cpu"``.
        release_gradients: Whether :meth:`memopt.Optimizer.release_gradients` steps in ``backward()``.
        deepspeed: Whether DeepSpeed runs the step, at the stage that the spec's partition names.
        bucket: Its buckets, in elements.
        mixed: ``"bf16"`` or ``"fp16"``: weights in fp32 and products in this dtype, by FSDP2's policy under ``/zero2``
            and ``/zero3``, else by torch.autocast.
        lora_targets: ``"all-linear"``, ``"attention"``, ``"default"`` (PEFT's for the family) or names of layers,
            separated by commas.
        lora_dtype: The adapters' dtype; PEFT makes them fp32 unless told otherwise.
        lora_dropout: Probability of dropout before each adapter.
        lora_kind: ``"lora"``, ``"rslora"`` (the same bytes) or ``"dora"``.
        modules_to_save: Names of modules of which PEFT trains a copy, separated by commas.
        kbit_prepare: ``"yes"`` or ``"no"``: whether PEFT's ``prepare_model_for_kbit_training`` was called; default
            yes for bitsandbytes' 4 and 8 bits.
        loss: ``"full"`` logits, ``"chunked"`` (TRL's, cut cross entropy) or ``"fused"`` (Liger's).
        outputs: ``"dropped"``, as Trainer does, or ``"kept"``: the model's output, logits included, lives until the
            backward pass is over. The upper bound always allows for it.
        frozen: Patterns of names of parameters that do not train, separated by commas.
        train: Patterns of those that do; the others do not.
        offload_activations: What layers save goes to pinned host memory.
        offload_params: Weights, gradients and state live on the host (FSDP2's CPUOffloadPolicy, DeepSpeed's
            offload_param).
        compile: torch.compile of the model: figures are those of eager mode, and no verdict.
        float8: torchao's float8 training of linear layers.
        versions: Of older libraries, which do otherwise: ``"torch=1.12,transformers=4.38,bitsandbytes=0.41"``
            (:mod:`estimators.versions`); default today's.
        alloc_conf: ``PYTORCH_ALLOC_CONF``, such as ``"expandable_segments:True"``; default torch's own.
        reference_model: The frozen second model of preference training (DPO): ``"same"`` for a copy, or a name or path.
        tp: Degree of tensor parallelism, with sequences cut between layers (GPUs are ``world_size * tp * pp * cp``).
        pp: Stages of a pipeline; ``accumulate`` are the micro-batches of a step, figures those of the fullest stage.
        cp: Ranks of context parallelism, which share each sequence, and shards of ``/zero2`` and ``/zero3``.
        ep: Of the data-parallel ranks, those that share the experts.
        replicas: HSDP's copies of what ``/zero2`` or ``/zero3`` shards, among the ``world_size`` ranks.
        schedule: The pipeline's: ``"1f1b"``, ``"gpipe"`` or ``"interleaved-V"``, V chunks of layers on each rank.
        regather: Tensor parallelism gathers inputs again in the backward pass (Megatron-LM) and saves its part of them.
        head: With which the model is counted: ``"causal-lm"``, ``"masked-lm"``, ``"classification"``, ``"none"`` … or a
            class of transformers (:mod:`estimators.heads`); default that with which its type is trained.
        packed: Each row of ``seq`` tokens is several sequences (TRL's packing), kept apart by a mask under ``sdpa``.
        inputs: A module's micro-batch (keywords, arguments or a tensor): one step is traced, and says batch and seq.
        fields: Hyperparameters, placement options and fields of :class:`memopt.OptimSpec`, as of :func:`memopt.create`.

    Returns:
        An :class:`Estimate`: ``columns`` by spec, ``rows`` in bytes, the ``peak`` and its phase, ``fits``.

    Raises:
        InputError: for a model, a card or a number that is not allowed.
        SpecError: for a spec or a keyword that is not allowed.

    >>> e = estimate("gpt2", "adamw-8bit", gpu="8GiB", seq=1024, batch=1)
    >>> e.parameters, e.fits, e.peak.phase
    (124439808, True, 'backward')
    >>> estimate("llama-3.1-8b", seq=2048, checkpointing="full").activations.saved
    1654693888
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= _MAX_WORLD_SIZE:
        raise InputError(f"world_size={shown(world_size)} is not allowed; it is from 1 to {_MAX_WORLD_SIZE}")
    if isinstance(gpu, bool) or (isinstance(gpu, int) and gpu < 1):
        raise InputError(f"gpu={shown(gpu)} is not allowed; it is a card's name, a size such as '24GiB' or bytes >= 1")
    asked = Training(
        batch=batch,
        seq=seq,
        checkpointing=checkpointing,
        attention=attention,
        lora=lora,
        quantised=quantised,
        accumulate=accumulate,
        device=device,
        release_gradients=release_gradients,
        deepspeed=deepspeed,
        bucket=bucket,
        mixed=mixed,
        lora_targets=lora_targets,
        lora_dtype=lora_dtype,
        lora_dropout=lora_dropout,
        lora_kind=lora_kind,
        modules_to_save=modules_to_save,
        kbit_prepare=kbit_prepare,
        loss=loss,
        outputs=outputs,
        frozen=frozen,
        train=train,
        offload_activations=offload_activations,
        offload_params=offload_params,
        compile=compile,
        float8=float8,
        versions=versions,
        alloc_conf=alloc_conf,
        reference_model=reference_model,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        replicas=replicas,
        schedule=schedule,
        regather=regather,
        head=head,
        packed=packed,
    )
    if is_adapter(model):
        from estimators.models.from_adapter import read

        model, said = read(os.fspath(model))
        defaults = Training()._asdict()
        asked = asked._replace(**{k: v for k, v in said.items() if getattr(asked, k) == defaults[k]})
    if inputs is not None:
        from estimators.traced.given import sizes

        batch, seq = sizes(inputs, asked)
        asked = asked._replace(batch=batch, seq=seq)
    training = asked.checked()
    if hasattr(model, "peft_config"):
        from estimators.models.from_adapter import dropout

        training = training._replace(lora_dropout=dropout(model, training.lora_dropout))
    specs = _parsed(spec, dict(fields))
    nbytes = gpu if gpu is None or isinstance(gpu, int) else capacity(gpu)
    described = with_head(resolve(model, inputs), training.head)
    weight_dtype = None if weights is None else dtype(weights, "weights")
    if mixed and not training.lora and weight_dtype not in (None, "float32"):
        raise InputError(f"mixed={mixed!r} is for weights in float32, not {weight_dtype}, unless adapters train")
    if mixed and not hasattr(model, "named_parameters"):  # a live module's weights are what they are
        weight_dtype = weight_dtype or "float32"
    gradient_dtype = None if gradients is None else dtype(gradients, "gradients")
    second = None
    if training.reference_model:
        from estimators.memory.reference_model import reference

        second = reference(described, training, weight_dtype)
    described = whole = as_trained(described, training, weight_dtype)
    if training.tp > 1 or training.ep > 1:
        from estimators.parallel.local import cut

        described = cut(described, training)
    card = gpu if isinstance(gpu, str) else ""
    found = columns(described, specs, ColumnRequest(training, world_size, gradient_dtype, card, second, spec))
    return Estimate(
        whole._replace(notes=found.model.notes),
        found.columns,
        nbytes,
        weight_dtype or _one(described, all_=True),
        gradient_dtype or _one(described, all_=False),
        world_size,
        training,
        found.ran,
        tuple(dict.fromkeys(one for column in found.columns for one in column.without)),
        _as_text,
    )


def _as_text(e: Estimate) -> str:
    from estimators.report.text import as_text

    return as_text(e)


def is_adapter(model: Any) -> bool:
    """Whether this is the path of a folder that PEFT saved."""
    path = model.__fspath__() if hasattr(model, "__fspath__") else model
    return isinstance(path, str) and "\0" not in path and os.path.isfile(os.path.join(path, "adapter_config.json"))


def _one(model: Model, *, all_: bool) -> str:
    """The dtype of all weights, or of those that train; ``mixed`` where there are several."""
    kinds = {model.dtypes.get(name, "bfloat16") for name, _ in model.shapes if all_ or name not in model.frozen}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "bfloat16"


def _parsed(spec: Any, fields: dict[str, Any]) -> "list[OptimSpec]":
    """The specs, each once."""
    from memopt.pricing.price import spec_fields
    from memopt.spec import OptimSpec, parse

    several = [spec] if isinstance(spec, (str, OptimSpec)) else list(spec)
    if not several:
        raise InputError("no spec was given; one is, for example, 'adamw-8bit'")
    given = spec_fields(fields)
    unique: dict[str, OptimSpec] = {}
    for one in several:
        try:
            parsed = parse(one, **given)
        except ValueError:
            from estimators.memory.other_optimizers import not_priced

            sentence = not_priced(one) if isinstance(one, str) else None
            if sentence is None:
                raise
            raise InputError(sentence) from None
        unique.setdefault(str(parsed), parsed)
    return list(unique.values())
