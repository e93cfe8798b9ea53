"""Rules that torch does not have are the published algorithm, or its author's code, within 1e-6 over 100 steps."""

import math

import pytest
import torch

import memopt
from tests.helpers.parity import STEPS, assert_close, gradients, parameters, run_both


def lion_reference(params, lr, betas, weight_decay):
    """Algorithm 2 of Chen et al. 2023, decay first as in its reference implementation; written down separately."""
    moments = [torch.zeros_like(p) for p in params]

    def step():
        for p, m in zip(params, moments, strict=True):
            c = betas[0] * m + (1 - betas[0]) * p.grad
            p.data.mul_(1 - lr * weight_decay).sub_(lr * torch.sign(c))
            m.copy_(betas[1] * m + (1 - betas[1]) * p.grad)

    return step


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_the_published_algorithm(weight_decay):
    a, b = parameters(), parameters()
    ours = memopt.create(a, "lion", lr=1e-3, weight_decay=weight_decay)
    reference = lion_reference(b, 1e-3, (0.9, 0.99), weight_decay)
    for t in range(STEPS):
        gradients(a, t)
        gradients(b, t)
        ours.step()
        reference()
    assert_close(a, b)


def came_reference(params, lr, betas, eps, d, weight_decay):
    """Algorithm 2 of Luo et al. 2023 with row and column factors kept apart, written down separately."""
    state = [{} for _ in params]

    def ema(store, name, value, beta):
        store[name] = beta * store.get(name, torch.zeros_like(value)) + (1 - beta) * value
        return store[name]

    def normalised(store, prefix, x, target, beta):
        """target / sqrt(the factored average of x)"""
        row = ema(store, prefix + "row", x.mean(-1), beta)
        col = ema(store, prefix + "col", x.mean(-2), beta)
        r = (row / row.mean(-1, keepdim=True)).unsqueeze(-1)
        return target / (r.sqrt() * col.unsqueeze(-2).sqrt())

    def step():
        for p, s in zip(params, state, strict=True):
            g = p.grad
            x = g**2 + eps[0]
            u = normalised(s, "v", x, g, betas[1]) if p.dim() >= 2 else g / ema(s, "v", x, betas[1]).sqrt()
            u = u / max(1.0, (u.norm() / math.sqrt(u.numel()) / d).item())
            m = ema(s, "m", u, betas[0])
            update = m
            if p.dim() >= 2:
                update = normalised(s, "r", (u - m) ** 2 + eps[1], m, betas[2])
            p.data.mul_(1 - lr * weight_decay).sub_(lr * update)

    return step


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_came_is_the_published_algorithm(weight_decay):
    a, b = parameters(), parameters()
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "d": 1.0, "weight_decay": weight_decay}
    ours, reference = memopt.create(a, "came", **kwargs), came_reference(b, **kwargs)
    for t in range(STEPS):
        gradients(a, t)
        gradients(b, t)
        ours.step()
        reference()
    assert_close(a, b, rtol=1e-5)  # 1 / sqrt(r) starts near 1e8 and amplifies the last bit


def adabound_reference(params, lr, betas, final_lr, gamma, eps, weight_decay):
    """The loop of the reference implementation (Luolc/AdaBound), written down separately."""
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    base, count = lr, 0

    def step(lr=lr):
        nonlocal count
        count += 1
        final = final_lr * lr / base
        low, high = final * (1 - 1 / (gamma * count + 1)), final * (1 + 1 / (gamma * count))
        for p, (m, v) in zip(params, state, strict=True):
            g = p.grad + weight_decay * p.data
            m.copy_(betas[0] * m + (1 - betas[0]) * g)
            v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
            size = lr * math.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
            p.data.sub_(torch.full_like(v, size).div(v.sqrt() + eps).clamp(low, high) * m)

    return step


def lamb_reference(params, lr, betas, eps, weight_decay):
    """Algorithm 2 of You et al. 2020 with norms, written down separately."""
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    count = 0

    def step():
        nonlocal count
        count += 1
        for p, (m, v) in zip(params, state, strict=True):
            m.copy_(betas[0] * m + (1 - betas[0]) * p.grad)
            v.copy_(betas[1] * v + (1 - betas[1]) * p.grad**2)
            r = (m / (1 - betas[0] ** count)) / ((v / (1 - betas[1] ** count)).sqrt() + eps) + weight_decay * p.data
            w, u = p.data.norm(), r.norm()
            p.data.sub_(lr * (w / u if w > 0 and u > 0 else 1.0) * r)

    return step


def ademamix_reference(params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay):
    """Listing of Pagliardini et al. 2025 (apple/ml-ademamix), written down separately."""
    state = [tuple(torch.zeros_like(p) for _ in range(3)) for p in params]
    count = 0

    def half_life(beta):
        return math.log(0.5) / math.log(beta) - 1

    def step():
        nonlocal count
        count += 1
        a = alpha if t_alpha is None else alpha * min(count / t_alpha, 1)
        b3 = betas[2]
        if t_beta3 is not None and count < t_beta3:
            # The paper's f and its inverse: beta = 0.5^(1 / (f + 1)), f linear in the step.
            share = count / t_beta3
            b3 = 0.5 ** (1 / ((1 - share) * half_life(betas[0]) + share * half_life(betas[2]) + 1))
        for p, (m1, m2, v) in zip(params, state, strict=True):
            m1.copy_(betas[0] * m1 + (1 - betas[0]) * p.grad)
            m2.copy_(b3 * m2 + (1 - b3) * p.grad)
            v.copy_(betas[1] * v + (1 - betas[1]) * p.grad**2)
            hat = m1 / (1 - betas[0] ** count)
            u = (hat + a * m2) / ((v / (1 - betas[1] ** count)).sqrt() + eps) + weight_decay * p.data
            p.data.sub_(lr * u)

    return step


def adammini_reference(params, lr, betas, eps, weight_decay):
    """Zhang et al. 2025 with the rows of this project as blocks: one scalar v for each, written as loops over them."""
    state = [(torch.zeros_like(p), {}) for p in params]
    count = 0

    def blocks(x):
        if x.dim() == 2 or (x.dim() > 2 and x.shape[-1] >= 64):
            return list(x.reshape(-1, x.shape[-1]))
        return list(x.flatten(1)) if x.dim() > 2 else list(x.reshape(-1).split(256))

    def step():
        nonlocal count
        count += 1
        for p, (m, means) in zip(params, state, strict=True):
            m.copy_(betas[0] * m + (1 - betas[0]) * p.grad)
            p.data.mul_(1 - lr * weight_decay)
            for i, (w, g, mean) in enumerate(zip(blocks(p.data), blocks(p.grad), blocks(m), strict=True)):
                means[i] = betas[1] * means.get(i, 0.0) + (1 - betas[1]) * g.square().mean().item()
                hat = math.sqrt(means[i] / (1 - betas[1] ** count)) + eps
                w.sub_(lr / (1 - betas[0] ** count) * mean / hat)

    return step


def stableadamw_reference(params, lr, betas, eps, d, weight_decay):
    """Algorithm 2 of Wortsman et al. 2023, with its debiased betas instead of a correction of the moments."""
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    count = 0

    def debiased(beta):
        return beta * (1 - beta ** (count - 1)) / (1 - beta**count)

    def step():
        nonlocal count
        count += 1
        b1, b2 = debiased(betas[0]), debiased(betas[1])
        for p, (m, v) in zip(params, state, strict=True):
            m.copy_(b1 * m + (1 - b1) * p.grad)
            v.copy_(b2 * v + (1 - b2) * p.grad**2)
            rms = (p.grad**2 / v.clamp(min=eps**2)).mean().sqrt().item() if p.numel() else 0.0
            rate = lr / max(1.0, rms / d)
            p.data.sub_(rate * weight_decay * p.data + rate * m / (v.sqrt() + eps))

    return step


ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MIX = {**ADAM, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha": None, "t_beta3": None}
PUBLISHED = [
    ("adabound", adabound_reference, {**ADAM, "final_lr": 0.1, "gamma": 1e-3}),
    ("adabound", adabound_reference, {**ADAM, "final_lr": 1e-4, "gamma": 0.1, "weight_decay": 0.0}),
    ("lamb", lamb_reference, {**ADAM, "eps": 1e-6}),
    ("lamb", lamb_reference, {**ADAM, "eps": 1e-6, "weight_decay": 0.0}),
    ("ademamix", ademamix_reference, MIX),
    ("ademamix", ademamix_reference, {**MIX, "t_alpha": 50, "t_beta3": 80}),
    ("adammini", adammini_reference, ADAM),
    ("stableadamw", stableadamw_reference, {**ADAM, "betas": (0.9, 0.99), "d": 1.0}),
    ("stableadamw", stableadamw_reference, {**ADAM, "betas": (0.9, 0.99), "d": 2.0}),
]


@pytest.mark.parametrize(
    ("rule", "reference", "kwargs"), PUBLISHED, ids=[f"{r} {i}" for i, (r, *_) in enumerate(PUBLISHED)]
)
def test_the_rule_is_the_published_algorithm(rule, reference, kwargs):
    a, b = parameters(), parameters()
    ours, theirs = memopt.create(a, rule, **kwargs), reference(b, **kwargs)
    for t in range(STEPS):
        # Gradients whose size jumps, so that bounds, trust ratios and clipping have something to do.
        for params in (a, b):
            gradients(params, t, scale=100.0 if t % 10 == 9 else 1.0)
        ours.step()
        theirs()
    assert_close(a, b, rtol=1e-5)


def test_adabounds_bounds_follow_a_schedule():
    a, b = parameters(), parameters()
    kwargs = {**ADAM, "final_lr": 1e-3, "gamma": 0.1}
    ours, theirs = memopt.create(a, "adabound", **kwargs), adabound_reference(b, **kwargs)
    rates = memopt.schedule(ours, "linear", total_steps=STEPS)
    for t in range(STEPS):
        gradients(a, t)
        gradients(b, t)
        theirs(lr=ours.param_groups[0]["lr"])
        ours.step()
        rates.step()
    assert_close(a, b, rtol=1e-5)


@pytest.mark.parametrize("inner", ["adamw", "sgd", "lamb"])
def test_lookahead_is_the_published_algorithm_around_any_rule(inner):
    a, b = parameters(), parameters()
    ours = memopt.create(a, f"lookahead({inner})", lookahead_steps=3, lookahead_rate=0.25)
    theirs = memopt.create(b, inner)
    slow = [p.detach().clone() for p in b]
    for t in range(31):
        gradients(a, t)
        gradients(b, t)
        ours.step()
        theirs.step()
        if t % 3 == 2:
            for p, s in zip(b, slow, strict=True):
                s.add_(p.detach() - s, alpha=0.25)
                p.data.copy_(s)
    assert_close(a, b)
    for p, s in zip(a, slow, strict=True):
        torch.testing.assert_close(ours.state[p]["slow"], s)


def test_ademamix_is_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    # Under 16 dimensions no embedding or blockwise path of theirs is taken in 32 bits; decay is decoupled in both.
    a, b = parameters()[:3], parameters()[:3]
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decay": 1e-2}
    run_both(memopt.create(a, "ademamix", **kwargs), bnb.optim.AdEMAMix(b, **kwargs, min_8bit_size=10**9), a, b)
    assert_close(a, b, rtol=1e-5)
