"""Columns of the three small tables on the device that the kernels read; rows of the first and the last are tensors."""

import triton.language as tl


def _columns(count: int) -> list[tl.constexpr]:
    return [tl.constexpr(i) for i in range(count)]


#: int64: what stays while parameters and state stay. Addresses, then the geometry of ``memopt/core/rows.py``.
#: PER_ROW: blocks of one row; MAGIC, SHIFT: the division by it; KEY: of the dither; STEP: address of the number of
#: steps where that is on the device, else 0; HEIGHT: rows of one matrix of a factored moment; ROWS_AT, COLS_AT,
#: MEANS_AT: where its sums and means are kept meanwhile; SUMS_AT, SUMS: sums over the tensor, the first and how many;
#: BESIDE, BESIDE_KEY: what a master keeps beside the parameter, and its dither; LINES: lines of a factored moment's
#: matrices in one row of ``memopt/core/rows.py``; STACKED: whether they are of a stack, even where one is held here;
#: ROW_SPAN, ROW_GROUP: elements that share one of Adam-mini's second moments, and how many of these a program renews;
#: SLOW: the slow weights of a rule inside lookahead(); LINE: columns of a matrix with a factored moment, COLS being
#: those of a row of ``memopt/core/rows.py`` where the other moments are in blocks.
(
    P,
    DATA0,
    DATA1,
    DATA2,
    AUX0,
    AUX1,
    AUX2,
    NUMEL,
    COLS,
    BLOCKS,
    PER_ROW,
    MAGIC,
    SHIFT,
    FIRST_ROW,
    KEY0,
    KEY1,
    KEY2,
    STEP,
    GROUP,
    HEIGHT,
    ROWS_AT,
    COLS_AT,
    MEANS_AT,
    SUMS_AT,
    SUMS,
    BESIDE,
    BESIDE_KEY,
    LINES,
    STACKED,
    ROW_SPAN,
    ROW_GROUP,
    SLOW,
    LINE,
) = _columns(33)
FIELDS = tl.constexpr(34)

#: fp64: the hyperparameters of one param group, before any are combined with the step. GRADIENT_SCALE: what gradients
#: are multiplied by, as far as the host knows it; MAX_NORM: the bound of the norm of all gradients together, infinite
#: where nothing is clipped.
(
    LR,
    WEIGHT_DECAY,
    BETA1,
    BETA2,
    BETA3,
    EPS1,
    EPS2,
    CLIP,
    MOMENTUM,
    DAMPENING,
    FINAL_LR,
    PEAK,
    GAMMA,
    ALPHA,
    ALPHA_STEPS,
    BETA3_STEPS,
    SLOW_STEPS,
    SLOW_RATE,
    MAXIMIZE,
    DECOUPLED,
    NESTEROV,
    TRANSFORMERS,
    SCALE_PARAMETER,
    RELATIVE_STEP,
    WARMUP_INIT,
    GRADIENT_SCALE,
    MAX_NORM,
) = _columns(27)
HYPER = tl.constexpr(28)  # even: rows begin at multiples of 16 bytes

#: fp32: the numbers of one step of one tensor, rounded where torch rounds them. RUN: 0 where this step does not
#: happen; SIGN: what the gradient is multiplied by; FIRST … THIRD: weights of interpolations, and whether they count
#: from the far end (torch.lerp does from 1/2 on); CARRIED: what SGD keeps of its buffer, 0 at the first step; PLAIN:
#: RAdam's step without its second moment; FLOOR, CEILING: bounds of a second moment and of its inverse root, or of
#: AdaBound's rates; SHRINK: a decay too small to be taken from 1, or LAMB's within its update; FIRST_BIAS:
#: 1 / (1 - b1^t); MIXED: how much of AdEMAMix's slow mean is taken; BEGINS, RETURNS: whether lookahead()'s slow weights
#: become the parameter, and the parameter them; LONGEST: what an element moves by at most where the second moment is
#: factored.
(
    RUN,
    T,
    SIGN,
    DECAY,
    L2,
    FIRST,
    FIRST_END,
    SECOND,
    SECOND_END,
    THIRD,
    THIRD_END,
    B2,
    REST2,
    INVERSE_BIAS,
    EPS,
    RATE,
    PLAIN,
    RATE_LR,
    MU,
    CARRIED,
    DAMP,
    LOOK_AHEAD,
    EPS_ADDED,
    EPS_RESIDUAL,
    FLOOR,
    CEILING,
    SHRINK,
    UPDATE_SCALE,
    MEAN_FLOOR,
    FIRST_BIAS,
    MIXED,
    SLOW_WEIGHT,
    SLOW_END,
    BEGINS,
    RETURNS,
    LONGEST,
) = _columns(36)
SCALARS = tl.constexpr(40)
