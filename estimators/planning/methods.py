"""What a plan tries, in the order of what is given up."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: Adapters are tried with this rank, the one most examples of PEFT and QLoRA use.
RANK = 16


class Method(NamedTuple):
    """A spec, what its placement is told, adapters, gradient release, and one sentence about what is given up."""

    spec: str
    why: str
    lora: int = 0
    quantised: str = ""
    release: bool = False
    offload_gradients: bool = False


#: In the order of what they cost in quality, then in speed.
METHODS = (
    Method("adamw", "nothing is given up: AdamW with 32-bit state"),
    Method("adamw-8bit", "state in 8 bits: a quarter of its size"),
    Method(
        "adamw-8bit",
        "8-bit state, and each parameter steps in the backward pass: no norm over all gradients to clip by",
        release=True,
    ),
    Method("adamw-8bit@paged", "8-bit state that moves to the host while the card is full: slower when it does"),
    Method("adamw-8bit.factored", "first moment in 8 bits, second factored: an eighth of its size, blind to patterns"),
    Method("adafactor", "factored second moment, no first moment: another update rule"),
    Method("adamw-4bit.factored", "first moment in 4 bits, second factored: a fifteenth of its size, noisier updates"),
    Method("adamw-8bit@host", "8-bit state in pinned host memory, streamed through the card: slower steps"),
    Method(
        "adamw-8bit@cpu",
        "8-bit state and gradients on the host, where the step runs: much slower steps",
        offload_gradients=True,
    ),
    Method(
        "apollo-8bit(adamw)",
        "8-bit moments of a projection of hidden matrices to 256 dimensions, 8-bit AdamW for the rest: another rule, "
        "which wants a rate of its own; no kernel, products in fp64",
    ),
    Method(
        "sinkgd-8bit(adamw)",
        "no state of hidden matrices, 8-bit AdamW for the rest: another rule, without momentum; no kernel on a card",
    ),
    Method(
        "scale-8bit(adamw)",
        "no state but 8-bit momentum of the output head: another rule; no kernel, its step takes memory of its own",
    ),
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


def asked_for(specs: Sequence[Any], options: Mapping[str, Any]) -> tuple[Method, ...]:
    """What is tried where specs, adapters or gradient release were asked for: with them, and with nothing else."""
    lora, quantised = options.get("lora", 0), options.get("quantised", "")
    release = bool(options.get("release_gradients"))
    if specs:
        return tuple(Method(str(spec), "the optimizer that was asked for", lora, quantised, release) for spec in specs)
    if lora:
        tried = [m for m in METHODS if not (m.lora or m.release or m.offload_gradients)]
        kinds = (quantised,) if quantised else ("", "nf4-double")
        found = [m._replace(lora=lora, quantised=kind, release=release) for kind in kinds for m in tried]
        return tuple(
            m._replace(why=f"{m.why}; adapters" + f" on {m.quantised} weights" * bool(m.quantised)) for m in found
        )
    if release:
        return tuple(m._replace(release=True) for m in METHODS if not (m.lora or m.offload_gradients or m.release))
    return METHODS
