"""The model's head and the loss. Source: transformers' loss/loss_utils.py, TRL's kernels/chunked_logprob.py and Liger's
fused_linear_cross_entropy."""

from __future__ import annotations

from estimators.activations.linear import linear
from estimators.activations.op import FP32, INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step


def loss(
    t: Tape,
    step: Step,
    x: Tensor,
    width: int,
    vocab: int,
    *,
    bias: bool = False,
    scaled: bool = False,
    capped: bool = False,
    upcast: bool = True,
) -> Tensor:
    """The head's projection and the cross-entropy of every token, for causal models computed in fp32 (``upcast``).

    The forward variable ``logits`` lives until the model returns, or as long as its output does. ``scaled``: logits
    are multiplied by a constant; ``capped``: divided, put through tanh and multiplied. Under tensor parallelism each
    rank has its part of the vocabulary, and the loss is taken over the parts.
    """
    x, vocab = t.gathered(x), -(-vocab // step.tp)
    if step.loss != "full":
        return _without_logits(t, step, x, width, vocab)
    logits = linear(t, x, width, vocab, bias)
    if scaled:
        logits = t.copy(logits)
    if capped:
        logits = t.copy(t.root(t.copy(logits)))
    t.held.append(logits)
    if t.outputs:
        t.outlives.append(logits)
    full = t.cast(logits, FP32) if upcast or t.mm != t.item else logits  # autocast computes the loss in fp32
    if upcast:
        t.held.append(full)
        if step.copied_logits:
            full = t.copy(full)
            t.held.append(full)
    # Over parts of the vocabulary torch's loss_parallel computes operation by operation: one tensor more forward, and
    # backward two (tensor/parallel/loss.py); Megatron-LM's computes in place.
    more = full.nbytes * (step.tp > 1 and not step.regather)
    log_probabilities = t.op([full], saves_out=True, forward_tmp=more)
    labels = t.tensor(x.numel // width, INT64)
    # Backward fills the gradient of the log-probabilities with zeros first.
    return t.op([log_probabilities], 1, FP32, saves=[log_probabilities, labels], backward_tmp=2 * more)


#: Tokens and columns of the logits that TRL's kernels/chunked_logprob.py makes at a time.
TILE = 4096, 16384


def _without_logits(t: Tape, step: Step, x: Tensor, width: int, vocab: int) -> Tensor:
    """The head and the loss without all logits at once.

    ``chunked``, as TRL's chunked_logprob.py: tiles of some tokens and columns, computed again in the backward pass,
    where the gradients of the input and of the weight are summed in fp32. Cut cross entropy keeps its tiles on the
    chip. ``fused``, as Liger's fused_linear_cross_entropy: as many chunks of tokens as the vocabulary is wider than the
    model, of a power of two each; gradients of the input and of the weight are made in the forward pass.
    """
    p = t.parameter((vocab, width))
    tokens, weight = x.numel // width, vocab * width
    cast = weight * t.mm if t.autocast and p.item != t.mm else 0
    if step.loss == "fused":
        few = -(-tokens // max(1, -(-vocab // width)))
        chunk = min(tokens, 1 << (few - 1).bit_length()) if tokens else 0
        # A chunk's logits, which become their gradient, and the weight's gradient: of all, and of a chunk, in fp32 too.
        tmp = chunk * vocab * t.mm + cast + weight * p.trains * (2 * p.item + FP32)
        whole = weight * p.item * p.trains
        return t.op([x], 1, FP32, saves=[t.tensor(x.numel, t.mm)], forward_tmp=tmp, gradients=whole)
    tile = min(tokens, TILE[0]) * min(vocab, TILE[1])
    sums = (x.numel + weight * p.trains) * FP32
    return t.op(
        [x],
        1,
        FP32,
        saves=[x],
        gradients=weight * p.item * p.trains,
        forward_tmp=tile * t.mm + cast,
        backward_tmp=tile * t.mm + cast + sums,
    )
