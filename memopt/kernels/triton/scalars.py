"""From hyperparameters and the number of the step to the numbers that the kernels use: what ``memopt/rules`` compute
in Python floats. On the device, so that a step needs nothing from the host: in a CUDA graph the number of the step and
a rate that is a tensor are read when the graph runs."""

import triton
import triton.language as tl

from memopt.core.hyperparameters import CLIP_EPS
from memopt.formats.factored import TINY
from memopt.kernels.triton.device import fields as f

#: The rules by number; ``adam`` is AdamW's too.
(
    ADAM,
    LION,
    SGD,
    RMSPROP,
    RADAM,
    ADAFACTOR,
    CAME,
    ADABOUND,
    ADEMAMIX,
    LAMB,
    STABLEADAMW,
    ADAMMINI,
) = (tl.constexpr(i) for i in range(12))
NUMBER = {
    "adam": ADAM,
    "adamw": ADAM,
    "adammini": ADAMMINI,
    "lion": LION,
    "sgd": SGD,
    "rmsprop": RMSPROP,
    "radam": RADAM,
    "adafactor": ADAFACTOR,
    "came": CAME,
    "adabound": ADABOUND,
    "ademamix": ADEMAMIX,
    "lamb": LAMB,
    "stableadamw": STABLEADAMW,
}

_TINY = tl.constexpr(TINY)
_CLIP_EPS = tl.constexpr(CLIP_EPS)
_INF = tl.constexpr(float("inf"))


@triton.jit
def power(x, t):
    """x^t for x >= 0 and t > 0 in fp64."""
    return tl.exp(t * tl.log(x))


@triton.jit
def put(to, field, value):
    tl.store(to + field, value.to(tl.float32))


@triton.jit
def put_lerp(to, field, weight):
    """As torch.lerp: from the far end where the weight is 1/2 or more."""
    far = tl.abs(weight.to(tl.float32)) >= 0.5
    put(to, field, tl.where(far, weight.to(tl.float32) - 1.0, weight.to(tl.float32)))
    put(to, field + 1, far)


@triton.jit
def relative_rate(h, t):
    """Adafactor's rate before it is scaled by the parameter's RMS."""
    lr = tl.load(h + f.LR)
    relative = 1.0 / tl.sqrt(t)
    own = tl.where(tl.load(h + f.WARMUP_INIT) != 0, 1e-6 * t, 1e-2)
    theirs = tl.where(tl.load(h + f.RELATIVE_STEP) != 0, tl.minimum(own, relative), lr)
    return tl.where(tl.load(h + f.TRANSFORMERS) != 0, theirs, tl.minimum(lr, relative))


@triton.jit
def radam_factor(t, beta2):
    """The rectification r_t, or -1 while it is not tractable."""
    infinite = 2.0 / (1.0 - beta2) - 1.0
    decay = power(beta2, t)
    rho = infinite - 2.0 * t * decay / (1.0 - decay)
    square = (rho - 4.0) * (rho - 2.0) * infinite / ((infinite - 4.0) * (infinite - 2.0) * rho)
    return tl.where(rho <= 5.0, -1.0, tl.sqrt(tl.where(rho <= 5.0, 1.0, square)))


@triton.jit
def slow_beta(h, t):
    """AdEMAMix's b3, whose half-life rises in a line from that of b1."""
    beta1 = tl.load(h + f.BETA1)
    beta3 = tl.load(h + f.BETA3)
    steps = tl.load(h + f.BETA3_STEPS)
    rises = (steps > 0) & (beta3 > 0)
    x = tl.minimum(t / tl.where(rises, steps, 1.0), 1.0)
    far = tl.log(tl.where(rises, beta3, 0.5))
    ratio = tl.where(beta1 > 0, far / tl.log(tl.where(beta1 > 0, beta1, 0.5)), 0.0)
    return tl.where(rises, tl.minimum(tl.exp(far / ((1.0 - x) * ratio + x)), beta3), beta3)


@triton.jit(do_not_specialize=["last"])
def prepare_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses; 0: there is none, and the tensor stays as it is
    hyper,  # fp64 [groups, HYPER]
    steps,  # fp64 [tensors]: the number of this step, where it is not counted on the device
    scalars,  # out: fp32 [tensors, SCALARS]
    flags,  # int32 [tensors + 2]: which gradients are not finite, whether any is; out: whether the step is left out
    skipped,  # int64 [1]: steps that did not happen
    found_inf,  # fp32 [1]: torch.amp.GradScaler's; 0 without one
    grad_scale,  # fp32 [1]: by which the loss was multiplied; 1 without one
    norm,  # fp32 [1]: of all gradients; 0 where nobody asked for it
    last,  # tensors
    RULE: tl.constexpr,
):
    """One program per tensor."""
    i = tl.program_id(0)
    row = table + i * f.FIELDS
    h = hyper + tl.load(row + f.GROUP) * f.HYPER
    to = scalars + i * f.SCALARS
    run = (tl.load(flags + last) == 0) & (tl.load(found_inf) == 0)
    if i == 0:
        tl.store(skipped, tl.load(skipped) + tl.where(run, 0, 1))
        tl.store(flags + last + 1, tl.where(run, 0, 1))
    run = run & (tl.load(gradients + i) != 0)
    put(to, f.RUN, run)

    counter = tl.load(row + f.STEP)
    t = tl.load(steps + i)
    if counter != 0:
        at = counter.to(tl.pointer_type(tl.float32))
        now = tl.load(at) + tl.where(run, 1.0, 0.0)
        tl.store(at, now)
        t = now.to(tl.float64)
    t = tl.maximum(t, 1.0)  # before a first step that did not happen nothing is used
    put(to, f.T, t)

    lr = tl.load(h + f.LR)
    weight_decay = tl.load(h + f.WEIGHT_DECAY)
    beta1 = tl.load(h + f.BETA1)
    beta2 = tl.load(h + f.BETA2)
    eps = tl.load(h + f.EPS1)
    sign = tl.where(tl.load(h + f.MAXIMIZE) != 0, -1.0, 1.0)
    size = tl.load(norm).to(tl.float64) + _CLIP_EPS
    bound = tl.load(h + f.MAX_NORM)
    clipped = (bound < size) & (size < _INF)
    factor = tl.where(clipped, bound / tl.where(clipped, size, 1.0), 1.0).to(tl.float32).to(tl.float64)
    inverse = (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)
    put(to, f.SIGN, sign * tl.load(h + f.GRADIENT_SCALE) * factor * inverse)
    decoupled = tl.load(h + f.DECOUPLED) != 0
    put(to, f.DECAY, tl.where(decoupled, 1.0 - lr * weight_decay, 1.0))
    put(to, f.L2, tl.where(decoupled, 0.0, weight_decay))
    put(to, f.RATE_LR, lr)
    put_lerp(to, f.FIRST, 1.0 - beta1)
    put_lerp(to, f.SECOND, 1.0 - beta2)
    put_lerp(to, f.THIRD, 1.0 - tl.load(h + f.BETA3))
    put(to, f.B2, beta2)
    put(to, f.REST2, 1.0 - beta2)
    put(to, f.EPS, eps)
    put(to, f.MEAN_FLOOR, t * 0.0 + _TINY)
    slow_steps = tl.load(h + f.SLOW_STEPS)
    looks_ahead = slow_steps > 0
    put_lerp(to, f.SLOW_WEIGHT, tl.load(h + f.SLOW_RATE))
    put(to, f.BEGINS, looks_ahead & (t == 1.0))
    turns = t / tl.where(looks_ahead, slow_steps, 1.0)
    put(to, f.RETURNS, looks_ahead & (turns == tl.floor(turns)))
    longest = lr * tl.maximum(1.0, (1.0 - beta1) / tl.sqrt(1.0 - beta2))
    put(to, f.LONGEST, longest if RULE == ADAM else t * 0.0 + _INF)
    if (
        (RULE == ADAM or RULE == LAMB) or RULE == STABLEADAMW
    ) or RULE == ADAMMINI:  # no chains: older versions of Triton
        put(to, f.INVERSE_BIAS, 1.0 / tl.sqrt(1.0 - power(beta2, t)))
        put(to, f.RATE, -lr / (1.0 - power(beta1, t)))
        put(to, f.FIRST_BIAS, 1.0 / (1.0 - power(beta1, t)))
        put(to, f.SHRINK, weight_decay)
    elif RULE == ADABOUND:
        peak = tl.load(h + f.PEAK)
        final = tl.load(h + f.FINAL_LR) * tl.where(peak > 0, lr / tl.where(peak > 0, peak, 1.0), 1.0)
        gamma = tl.load(h + f.GAMMA)
        put(to, f.RATE, lr * tl.sqrt(1.0 - power(beta2, t)) / (1.0 - power(beta1, t)))
        put(to, f.FLOOR, final * (1.0 - 1.0 / (gamma * t + 1.0)))
        put(to, f.CEILING, final * (1.0 + 1.0 / (gamma * t)))
    elif RULE == ADEMAMIX:
        steps = tl.load(h + f.ALPHA_STEPS)
        risen = tl.where(steps > 0, tl.minimum(t / tl.where(steps > 0, steps, 1.0), 1.0), 1.0)
        put(to, f.MIXED, tl.load(h + f.ALPHA) * risen)
        put_lerp(to, f.THIRD, 1.0 - slow_beta(h, t))
        put(to, f.INVERSE_BIAS, 1.0 / tl.sqrt(1.0 - power(beta2, t)))
        put(to, f.FIRST_BIAS, 1.0 / (1.0 - power(beta1, t)))
        put(to, f.RATE, -lr)
        put(to, f.LONGEST, longest + lr * tl.load(h + f.ALPHA) * risen)
    elif RULE == RADAM:
        factor = radam_factor(t, beta2)
        scale = -lr / (1.0 - power(beta1, t))
        put(to, f.PLAIN, factor < 0)
        put(to, f.LONGEST, longest * factor)
        put(to, f.RATE, tl.where(factor < 0, scale, scale * factor * tl.sqrt(1.0 - power(beta2, t))))
    elif RULE == SGD or RULE == RMSPROP:
        momentum = tl.load(h + f.MOMENTUM)
        put(to, f.MU, momentum)
        put(to, f.CARRIED, tl.where(t == 1.0, 0.0, momentum))
        put(to, f.DAMP, tl.where(t == 1.0, 1.0, 1.0 - tl.load(h + f.DAMPENING)))
        put(to, f.LOOK_AHEAD, tl.load(h + f.NESTEROV))
    elif RULE == ADAFACTOR:
        theirs = tl.load(h + f.TRANSFORMERS) != 0
        put_lerp(to, f.SECOND, power(t, beta2))  # BETA2 holds beta2_decay
        put(to, f.EPS_ADDED, tl.where(theirs, eps, 0.0))
        put(to, f.FLOOR, tl.where(theirs, -1.0, eps * eps))
        put(to, f.CEILING, tl.where(theirs, _INF, 1.0 / eps))
        put(to, f.MEAN_FLOOR, tl.where(theirs, _TINY, tl.maximum(eps, _TINY)))
    elif RULE == CAME:
        put(to, f.EPS_ADDED, eps)
        put(to, f.EPS_RESIDUAL, tl.load(h + f.EPS2))
        put(to, f.FLOOR, eps * 0.0 - 1.0)
        put(to, f.CEILING, eps * 0.0 + _INF)


@triton.jit
def totals_kernel(
    table,  # int64 [tensors, FIELDS]
    hyper,  # fp64 [groups, HYPER]
    scalars,  # fp32 [tensors, SCALARS]
    which,  # int32 [programs]: tensors
    sums,  # fp64 [programs of the pass, 2]: sums of p² and of u²
    RULE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """From the sums over a tensor to the size of its update; one program per tensor. The sums are added in
    order, so the result is the same in every run."""
    i = tl.load(which + tl.program_id(0)).to(tl.int64)
    row = table + i * f.FIELDS
    h = hyper + tl.load(row + f.GROUP) * f.HYPER
    to = scalars + i * f.SCALARS
    first = tl.load(row + f.SUMS_AT)
    count = tl.load(row + f.SUMS)
    parameter = tl.zeros((SPAN,), tl.float64)
    update = tl.zeros((SPAN,), tl.float64)
    for start in range(0, count, SPAN):
        at = start + tl.arange(0, SPAN)
        parameter += tl.load(sums + (first + at) * 2, mask=at < count, other=0.0)
        update += tl.load(sums + (first + at) * 2 + 1, mask=at < count, other=0.0)
    numel = tl.maximum(tl.load(row + f.NUMEL), 1).to(tl.float64)
    step = tl.sqrt(tl.sum(update) / numel)
    size = tl.sqrt(tl.sum(parameter) / numel)
    rms = step / tl.load(h + f.CLIP)
    clip = tl.where(rms < 1.0, 1.0, rms)  # a NaN stays
    if RULE == ADAFACTOR:
        rate = relative_rate(h, tl.load(to + f.T).to(tl.float64))
        size = tl.where(size < tl.load(h + f.EPS2), tl.load(h + f.EPS2), size)
        rate = tl.where(tl.load(h + f.SCALE_PARAMETER) != 0, rate * size, rate)
        put(to, f.UPDATE_SCALE, rate / clip)
        put(to, f.SHRINK, tl.where(tl.load(h + f.TRANSFORMERS) != 0, tl.load(h + f.WEIGHT_DECAY) * rate, 0.0))
    elif RULE == CAME:
        put(to, f.UPDATE_SCALE, 1.0 / clip)
    else:
        # AdamW's step follows, with this decay and this rate.
        some = (size > 0) & (step > 0)
        trust = tl.where(some, size / tl.where(some, step, 1.0), 1.0) if RULE == LAMB else 1.0 / clip
        put(to, f.RATE, tl.load(to + f.RATE).to(tl.float64) * trust)
        put(to, f.DECAY, 1.0 - tl.load(h + f.LR) * trust * tl.load(h + f.WEIGHT_DECAY))
