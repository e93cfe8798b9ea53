"""Activations: what a forward pass keeps for the backward pass, and how much is alive at each moment of both.

No torch: a family's forward pass is written once with operations that only count (:mod:`~.tape`), and
:mod:`~.simulate` runs it forward and backward.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from estimators.activations.blocks import Network, Step
from estimators.activations.simulate import Backward, Forward, backward, forward
from estimators.activations.tape import Tape, Tensor
from estimators.fields import Fields

#: ``model_type`` -> module here and the name of its function. A family that is not here has no formula, and an
#: estimate says so.
WRITTEN = {
    "cohere": ("llama", "cohere"),
    "gemma": ("llama", "gemma"),
    "gemma2": ("llama", "gemma2"),
    "gemma3_text": ("llama", "gemma3_text"),
    "glm4": ("llama", "glm4"),
    "bert": ("bert", "bert"),
    "bloom": ("gpt", "bloom"),
    "deepseek_v2": ("deepseek", "deepseek_v2"),
    "deepseek_v3": ("deepseek", "deepseek_v3"),
    "distilbert": ("bert", "distilbert"),
    "gpt_bigcode": ("gpt", "gpt_bigcode"),
    "gptj": ("gpt", "gptj"),
    "gpt2": ("gpt", "gpt2"),
    "gpt_neox": ("gpt", "gpt_neox"),
    "granite": ("llama", "llama"),
    "llama": ("llama", "llama"),
    "ministral3": ("llama", "ministral3"),
    "mistral": ("llama", "mistral"),
    "mixtral": ("moe", "mixtral"),
    "olmo": ("llama", "olmo"),
    "olmo2": ("llama", "olmo2"),
    "olmo3": ("llama", "olmo2"),
    "olmoe": ("moe", "olmoe"),
    "opt": ("gpt", "opt"),
    "phi": ("gpt", "phi"),
    "phi3": ("llama", "phi3"),
    "qwen2": ("llama", "qwen2"),
    "qwen2_moe": ("moe", "qwen2_moe"),
    "qwen3": ("llama", "qwen3"),
    "qwen3_moe": ("moe", "qwen3_moe"),
    "roberta": ("bert", "bert"),
    "smollm3": ("llama", "smollm3"),
    "starcoder2": ("gpt", "starcoder2"),
    "vit": ("vit", "vit"),
    "xlm-roberta": ("bert", "bert"),
}

#: Families whose formula was checked under torch.autocast: all but DeepSeek and those with eager attention only.
MIXED = frozenset(WRITTEN) - {"bloom", "deepseek_v2", "deepseek_v3", "gemma2", "gptj"}

ATTENTIONS = ("sdpa", "flash", "eager")
CHECKPOINTINGS = ("none", "full")


class Moment(NamedTuple):
    """Bytes alive at the fullest moment of a phase: activations of every kind, and gradients of parameters."""

    activations: int
    gradients: int


class Activations(NamedTuple):
    """``saved`` is what the forward pass leaves for the backward pass, the loss included (under checkpointing the
    layers' inputs); then the fullest moment of each phase. ``accumulated`` is the fullest moment of a backward pass
    that adds to gradients which are all there already. ``copies`` are autocast's copies of weights at the end of the
    forward pass, which the moments of forward and loss contain (the former without the head's)."""

    saved: int
    forward: Moment
    loss: Moment
    backward: Moment
    accumulated: Moment
    copies: int = 0
    body_copies: int = 0


class _Segment(NamedTuple):
    x: int
    out: int
    forward: Forward
    unsaved: Forward
    backward: Backward
    cached: int


def written(model_type: str) -> bool:
    """Whether the family has a formula."""
    return model_type in WRITTEN


def activations(config: Mapping[str, Any], source: str, step: Step, checkpointing: str = "none") -> Activations:
    """Of one micro-batch. Raises KeyError for a family or a nonlinearity without a formula."""
    module, name = WRITTEN[config["model_type"]]
    function: Callable[[Fields, Step], Network] = getattr(import_module(f"estimators.activations.{module}"), name)
    return _composed(function(Fields(config, source), step), step, checkpointing == "full")


def _segment(
    step: Step, x: Tensor, body: Callable[[Tape], Tensor], *, loss: bool = False, input_gradients: bool = False
) -> tuple[_Segment, Tensor]:
    tape = Tape(step.item, step.rank, x, step.cpu, step.mixed)
    tape.input_gradients = input_gradients
    tape.out = body(tape)
    ran = _Segment(x.nbytes, tape.out.nbytes, forward(tape), forward(tape, saving=False),
                   backward(tape, gradient=not loss), tape.cached)  # fmt: skip
    return ran, Tensor(tape.out.numel, tape.out.item, tape.out.requires)


def _composed(network: Network, step: Step, checkpointed: bool) -> Activations:
    """Segments one after the other. A layer of a kind that was run already, with an input of the same kind, is not
    run again: every layer after the first costs nothing."""
    first, x = _segment(step, Tensor(0, step.item, requires=False), network.embed, input_gradients=checkpointed)
    if checkpointed:
        x.requires = True  # enable_input_require_grads: a checkpointed layer without it would get no gradient
    seen: dict[tuple[str, bool], tuple[_Segment, Tensor]] = {}
    body: list[_Segment] = []
    for kind, layer in network.layers:
        key = (kind, x.requires)
        if key not in seen:
            seen[key] = _segment(step, x, lambda tape, layer=layer: layer(tape, tape.x))  # type: ignore[misc]
        segment, out = seen[key]
        body.append(segment)
        x = Tensor(out.numel, out.item, out.requires)
    last, _ = _segment(step, x, lambda tape: network.head(tape, tape.x), loss=True)
    return _walk(first, body, last, network.tables, checkpointed)


def _kept(segment: _Segment, checkpointed: bool, already: bool) -> int:
    """Bytes that a segment leaves: under checkpointing its input alone. ``already``: its input is kept anyway."""
    if checkpointed:
        return 0 if already else segment.x
    return segment.forward.saved + (segment.x if segment.forward.saves_input and not already else 0)


def _walk(first: _Segment, body: list[_Segment], last: _Segment, tables: int, checkpointed: bool) -> Activations:
    """Forward through the segments, then backward, noting the fullest moment of each phase."""
    held = first.forward.saved + tables
    top = first.forward.peak + tables
    before: list[int] = []  # bytes kept ahead of each segment
    out_kept = first.forward.saves_output
    held += first.out if out_kept else 0
    copies = 0  # of weights, which checkpointing does not keep but autocast does
    for segment in body:
        ran = segment.unsaved if checkpointed else segment.forward
        before.append(held)
        copies += segment.cached
        top = max(top, held + (0 if out_kept else segment.x) + ran.peak + copies * checkpointed)
        held += _kept(segment, checkpointed, out_kept)
        out_kept = ran.saves_output and not checkpointed
        held += segment.out if out_kept else 0
    before.append(held)
    in_loss = held + (0 if out_kept else last.x) + last.forward.peak + copies * checkpointed
    held += _kept(last, False, out_kept)

    made = 0
    fullest, accumulated = Moment(0, 0), 0
    for segment, ahead, is_layer in zip([first, *body, last][::-1], [tables, *before][::-1],
                                        [False, *[True] * len(body), False][::-1], strict=True):  # fmt: skip
        run = segment.backward
        left = ahead
        if is_layer and checkpointed:
            # The input is kept; gradients wait while the layer runs again.
            again = ahead + segment.x + run.waiting + segment.forward.peak
            fullest = max(fullest, Moment(again, made), key=sum)
            accumulated = max(accumulated, again)
            left += 0 if segment.forward.saves_input else segment.x
        fullest = max(fullest, Moment(left + run.activations, made + run.gradients), key=sum)
        accumulated = max(accumulated, left + run.most)
        made += segment.backward.total
    # What a checkpointed layer is called with is alive, but not saved.
    return Activations(
        held - (tables if checkpointed else 0), Moment(top, 0), Moment(in_loss, 0), fullest, Moment(accumulated, made),
        copies + last.cached, copies,
    )  # fmt: skip
