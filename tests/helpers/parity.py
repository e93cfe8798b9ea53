"""The same steps of two optimizers, and how far apart their parameters may be."""

import torch

#: fp32 arithmetic in another order, over 100 steps: relative to the largest element of a tensor.
RTOL = 1e-6
STEPS = 100
SHAPES = [(10, 5), (67, 33), (4, 3, 3, 3), (7,), (), (1, 1), (3, 40, 30)]


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in SHAPES]


def gradients(params, step, scale=1.0):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def assert_close(ours, theirs, rtol=RTOL):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(b).all()
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error <= rtol * max(b.abs().max().item() if b.numel() else 0.0, 1e-3), f"{tuple(a.shape)}: {error}"


def run_both(ours, theirs, ours_params, theirs_params, steps=STEPS, scale=1.0):
    for t in range(steps):
        gradients(ours_params, t, scale)
        gradients(theirs_params, t, scale)
        ours.step()
        theirs.step()
