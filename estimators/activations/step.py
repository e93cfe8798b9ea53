"""One micro-batch, as the operations of a forward pass are told of it."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple


class Step(NamedTuple):
    """One micro-batch: sequences, tokens of each, how attention is computed (``sdpa``, ``flash``, ``eager``), bytes of
    one element of activations, rank of LoRA's adapters on all linear layers (0: none, or as the parameters say),
    whether it runs on a CPU, bytes of one element of what autocast computes (0: no autocast), the adapters' dropout,
    whether the model's output, logits included, lives until the backward pass is over; whether the loss makes all
    logits (``full``), those of some tokens at a time (``chunked``), or gradients with them (``fused``); whether linear
    layers are torchao's float8, whether what layers save goes to the host, and whether ``sdpa`` has no kernel for
    grouped heads, so that keys and values are repeated; whether the loss copies the logits without their last token,
    and whether 4-bit products save their input (older libraries). ``seq`` is this rank's part of a sequence that ``cp``
    ranks share, of which between layers ``tp`` ranks have a part each; ``regather``: what is gathered for a product is
    gathered again in the backward pass, as Megatron-LM does, and not saved. ``ep`` ranks share the experts.
    ``packed``: a row of tokens is several sequences, which do not see each other. ``pins``: checkpointing runs the
    first forward pass with autograd, so that what nodes keep as attributes stays."""

    batch: int
    seq: int
    attention: str
    item: int
    rank: int = 0
    cpu: bool = False
    mixed: int = 0
    lora_dropout: float = 0.0
    outputs: bool = False
    loss: str = "full"
    float8: bool = False
    offload: bool = False
    expand: bool = False
    copied_logits: bool = False
    saves_quantised_input: bool = False
    tp: int = 1
    cp: int = 1
    ep: int = 1
    regather: bool = False
    packed: bool = False
    pins: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def mask(self, masked: bool) -> int:
        """Elements of a mask that says more than which token comes first (``masked``). A kernel that takes lengths and
        windows (``flash``) does not need it."""
        return self.batch * self.seq**2 * (masked and self.attention == "sdpa")
