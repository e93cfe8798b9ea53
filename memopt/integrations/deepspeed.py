"""DeepSpeed: a configuration in which our optimizer is the one that runs, and how to see that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.spec import OptimSpec, parse

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer

_STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(
    spec: str | OptimSpec,
    *,
    micro_batch: int = 1,
    accumulate: int = 1,
    offload: bool = False,
    max_norm: float = 0.0,
    hyper: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The ``config`` of ``deepspeed.initialize`` for a spec; its partition is the stage.

    Make the optimizer with the spec without its partition, for it is DeepSpeed that shards::

        config = memopt.deepspeed_config("adamw-8bit/zero2", micro_batch=4)
        optimizer = memopt.create(model, "adamw-8bit", lr=2e-5)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    DeepSpeed replaces an optimizer that it does not know by its own where there is offload, and refuses it without: two
    keys here say otherwise.

    Args:
        spec: A spec whose partition is the ZeRO stage: ``/zero1``, ``/zero2``, ``/zero3``, or none for stage 0.
        micro_batch: Samples of one rank in one forward pass (``train_micro_batch_size_per_gpu``).
        accumulate: Micro-batches of one step (``gradient_accumulation_steps``).
        offload: Keep state and step in host memory (``offload_optimizer``); needs a stage.
        max_norm: ``gradient_clipping``; 0 clips nothing, and is written because DeepSpeed's own default is 1.
        hyper: Hyperparameters without which the spec has no meaning, as ``{"momentum": 0.9}`` of ``sgd-bf16``.
        more: Further keys of the configuration, or others in the place of these.

    Returns:
        A dictionary for ``config=``; plain values, so it can be written as JSON.

    Raises:
        SpecError: for a spec that means nothing, and for offload without a stage.

    >>> deepspeed_config("adamw-8bit/zero2", micro_batch=4)["zero_optimization"]
    {'stage': 2}
    """
    parsed = parse(spec, hyper=dict(hyper)) if hyper else parse(spec)
    parsed.resolve()  # a spec that means nothing is refused here, before anything is launched
    stage = _STAGES[parsed.partition]
    if offload and not stage:
        raise SpecError("offload=True needs a stage: a spec that ends in /zero1, /zero2 or /zero3")
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def check_engine(engine: Any) -> None:
    """Raise RuntimeError unless a memopt.Optimizer is what a DeepSpeed engine, or accelerate's wrapper of it, steps,
    and DeepSpeed can keep its state: see :func:`memopt.partitions.deepspeed.metadata.cannot_keep`. The first step says
    the latter by itself."""
    stepped_by(engine)


def stepped_by(engine: Any) -> Optimizer:
    """The memopt.Optimizer that an engine steps. Raises RuntimeError as :func:`check_engine`."""
    from memopt.optimizer import Optimizer
    from memopt.partitions.deepspeed.metadata import cannot_keep

    found: Any = engine.optimizer if hasattr(engine, "optimizer") else engine
    while not isinstance(found, Optimizer) and hasattr(found, "optimizer"):
        reason = cannot_keep(found)
        if reason:
            raise RuntimeError(reason)
        found = found.optimizer
    if not isinstance(found, Optimizer):
        raise RuntimeError(
            f"DeepSpeed runs {type(found).__name__} in place of the memopt.Optimizer it was given; its configuration "
            "needs 'zero_force_ds_cpu_optimizer': false (memopt.deepspeed_config writes it)"
        )
    return found
