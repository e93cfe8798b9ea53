"""The activations of a model for which there is no formula: one of its steps, run on fake tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from estimators.activations import Activations
from estimators.activations.recorded import Recorded
from estimators.errors import InputError
from estimators.models.model import Model
from estimators.traced.as_real import OnCard
from estimators.traced.build import built, quiet, reason
from estimators.traced.inputs import InputShape, Mended, inputs, told
from estimators.traced.repeats import Stack, shallow, stacks
from estimators.traced.segments import Unlike
from estimators.traced.step import Faked, TracedRun, run, training, weights_faked
from estimators.traced.tape import activations
from estimators.training import Training

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def traced(model: Model, asked: Training, sharded: bool = False) -> tuple[Activations | None, str]:
    """The activations of one micro-batch, or None and why they are not known. ``sharded``: FSDP2 computes in 16 bits
    throughout."""
    refused = _refused(model, asked)
    if refused:
        return None, f"activations ({refused})"
    mixed = _DTYPES[asked.mixed] if asked.mixed and not sharded else None
    key = _key(model, asked, sharded)
    if key not in _KNOWN:
        try:
            with quiet(), _module(model, asked, sharded) as (module, faked):
                recorded, notes = _recorded(model, module, faked, asked, mixed)
        except InputError as error:
            return None, f"activations ({error})"
        found = activations(recorded, asked.outputs == "kept")._replace(notes=notes)
        if key is None:
            return found, ""
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = found
    return _KNOWN[key], ""


#: The last steps of models that were built here: plans and several specs ask for the same ones again.
_KNOWN: dict[Any, Activations] = {}
_MOST_KNOWN = 32


def _key(model: Model, asked: Training, sharded: bool) -> Any:
    """What a step depends on, of a model that is built here; a caller's own module or inputs may have changed since."""
    if model.module is not None or model.inputs is not None:
        return None
    plain = Training()
    aside = {name: getattr(plain, name) for name in ("accumulate", "release_gradients", "deepspeed", "bucket")}
    step = asked._replace(**aside, offload_params=False)
    dtypes = tuple(sorted(model.dtypes.items()))
    return json.dumps(model.config, sort_keys=True, default=str), model.head, step, sharded, model.frozen, dtypes


def _refused(model: Model, asked: Training) -> str:
    """What a traced step does not know."""
    unknown = {
        "quantised": "weights in 4 or 8 bits",
        "float8": "float8",
        "offload_activations": "offload of activations",
    }
    for name, what in unknown.items():
        if getattr(asked, name):
            return f"a traced step does not know {what}"
    if asked.packed and model.module is None:
        return "a traced step has one sequence in a row of tokens"
    if asked.versions:
        return f"a traced step is that of the libraries that are installed, not of versions={asked.versions!r}"
    if asked.loss != "full":
        return f"a traced step has the loss that the model computes, not loss={asked.loss!r}"
    if asked.lora and model.module is not None:
        return "wrap the module with PEFT itself: lora is for models that are built here"
    return ""


@contextmanager
def _module(model: Model, asked: Training, sharded: bool) -> Iterator[tuple[torch.nn.Module, Faked]]:
    """The module with fake weights, as it trains."""
    dtype = torch.bfloat16 if sharded and asked.mixed else _dtype(model)
    if model.module is not None:
        faked = Faked()
        whole = model.module
        with weights_faked(whole, faked, dtype), training(whole), _checkpointed(whole, asked.checkpointing):
            yield whole, faked
        return
    assert model.config is not None
    attention = "eager" if asked.attention == "eager" else None
    names = {name for name, _ in model.shapes}

    def prepare(module: torch.nn.Module) -> torch.nn.Module:
        for name, p in module.named_parameters():
            p.requires_grad_(name in names and name not in model.frozen)
        return _adapted(module, model, asked) if asked.lora else module

    module, faked = built(model.config, model.name, model.head, dtype or torch.bfloat16, attention, prepare)
    with _checkpointed(module, asked.checkpointing):
        yield module, faked


def _dtype(model: Model) -> torch.dtype | None:
    """Of the model's weights, where they have one."""
    kinds = {kind for name, kind in model.dtypes.items() if ".lora_" not in name}
    return getattr(torch, kinds.pop()) if len(kinds) == 1 else None


def _adapted(module: torch.nn.Module, model: Model, asked: Training) -> torch.nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("PEFT makes the adapters of a traced step: pip install peft") from None
    end = ".lora_A.default.weight"
    config = LoraConfig(
        r=asked.lora,
        target_modules=[n.removesuffix(end) for n, _ in model.shapes if n.endswith(end)],
        lora_dropout=asked.lora_dropout,
        use_dora=asked.lora_kind == "dora",
        use_rslora=asked.lora_kind == "rslora",
        modules_to_save=asked.modules_to_save.replace(",", " ").split() or None,
    )
    try:
        with quiet():
            adapted: torch.nn.Module = get_peft_model(
                module, config, autocast_adapter_dtype=asked.lora_dtype == "fp32", low_cpu_mem_usage=True
            )
        return adapted
    except Exception as error:
        raise InputError(f"PEFT does not adapt {type(module).__name__}: {reason(error)}") from None


@contextmanager
def _checkpointed(module: Any, how: str) -> Iterator[None]:
    """transformers' own checkpointing, turned off again. What a module of the user's checkpoints itself is seen as it
    is."""
    if how == "none" or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    enable: Any = getattr(module, "activation_checkpointing_enable", None)
    old: Any = getattr(module, "gradient_checkpointing_enable", None)
    if enable is None and old is None:
        raise InputError(
            f"checkpointing={how!r} is turned on by a method that {type(module).__name__} does not have; call "
            "torch.utils.checkpoint in its forward pass, which is seen as it is"
        )
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how.startswith("selective"):
        kwargs["context_fn"] = _selective(how)
    every = int(how.removeprefix("every-")) if how.startswith("every-") else 1
    if every > 1 and enable is None:
        raise InputError(f"checkpointing={how!r} needs transformers 5.20 or later")
    try:
        if enable is not None:
            enable(activation_checkpointing_kwargs=kwargs, every_n_layers=every)
        else:
            old(gradient_checkpointing_kwargs=kwargs)
    except Exception as error:
        raise InputError(f"{type(module).__name__} does not checkpoint: {reason(error)}") from None
    if any(".lora_" in name for name, _ in module.named_parameters()) and hasattr(module, "enable_input_require_grads"):
        module.enable_input_require_grads()  # as Trainer does
    try:
        yield
    finally:
        module.gradient_checkpointing_disable()


def _selective(how: str) -> Any:
    """A context_fn of torch.utils.checkpoint. ``selective`` keeps matrix products and fused attention, ``selective-2``
    of ``mm`` every second."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    names = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
    products = {getattr(aten, n).default for n in names if hasattr(aten, n)}
    attention = {
        getattr(aten, f"_scaled_dot_product_{n}").default
        for n in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
        if hasattr(aten, f"_scaled_dot_product_{n}")
    }

    def context_fn() -> Any:
        seen = {False: 0, True: 0}

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
            keep = op in products or op in attention
            if how == "selective-2" and op in products:
                seen[ctx.is_recompute] += 1
                keep = bool(seen[ctx.is_recompute] % 2)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return context_fn


def _recorded(
    model: Model, module: Any, faked: Faked, asked: Training, mixed: torch.dtype | None
) -> tuple[Recorded, tuple[str, ...]]:
    """The events of a step, of the whole depth; with fewer layers where they repeat."""
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    given: Any
    base = _base(module)
    failed: list[tuple[Any, Exception]] = []
    if model.inputs is not None:
        ways: Any = [(model.inputs, "")]
    else:
        if not hasattr(getattr(base, "config", None), "to_dict"):
            raise InputError("pass inputs, of one micro-batch: only for transformers' models are they made here")
        ways = list(inputs(base, InputShape(asked.batch, asked.seq, first), faked))
    for given, note in ways:
        try:
            recorded, notes = _deep(module, given, faked, asked, mixed)
            return recorded, (*((f"activations are those {note}",) if note else ()), *notes)
        except Exception as one:
            failed.append((given, one))
    error = failed[0][1]
    if model.inputs is None and not isinstance(error, InputError):
        ahead = Mended(base, InputShape(asked.batch, asked.seq, first))
        for given, why in failed:
            ahead.failed(given, why)
        for given in ahead:
            try:
                recorded, notes = _deep(module, given, faked, asked, mixed)
                return recorded, (f"activations are those {told(given)}", *notes)
            except Exception as one:
                ahead.failed(given, one)
    if isinstance(error, InputError):
        raise error
    raise InputError(f"a step of {type(module).__name__} on fake tensors fails: {reason(error)}")


def _base(module: Any) -> Any:
    """What PEFT wrapped."""
    get = getattr(module, "get_base_model", None)
    return get() if get else module


def _deep(
    module: Any, given: Any, faked: Faked, asked: Training, mixed: torch.dtype | None
) -> tuple[Recorded, tuple[str, ...]]:
    found = stacks(module)
    if found:
        try:
            with shallow(found) as layers:
                ran = _run(module, given, faked, asked, mixed, layers)
            recorded = ran.segments.recorded([s.period for s in found])
            return recorded, (*ran.notes, *map(_said, found))
        except InputError:
            raise
        except Exception:  # layers that are not alike, or that are called by number: the whole model is run
            pass
    ran = _run(module, given, faked, asked, mixed, [])
    return ran.segments.recorded(), ran.notes


def _said(s: Stack) -> str:
    return f"{len(s.layers)} layers of {s.name} follow from {s.kept} of them"


def _run(
    module: Any, given: Any, faked: Faked, asked: Training, mixed: torch.dtype | None, layers: list[Any]
) -> TracedRun:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    with ExitStack() as stack:
        if asked.device != "cpu":
            stack.enter_context(OnCard())
        return run(module, given, faked, lambda _: layers, head, mixed)


__all__ = ["Unlike", "traced"]
