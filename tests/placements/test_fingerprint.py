"""A number that tells two tensors apart by their bits."""

import pytest
import torch

from memopt.placements.gradients.checksum import fingerprint
from memopt.placements.workspaces import AT_ONCE, WIDTH, looking
from tests.helpers.cases import assert_same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
@pytest.mark.parametrize("n", [1, 5, WIDTH, WIDTH + 1, AT_ONCE + 3 * WIDTH + 7])
def test_a_fingerprint_tells_apart(dtype, n):
    x = torch.randn(n).mul(50).to(dtype)
    mark = fingerprint(x)
    assert mark.dtype == torch.int64
    assert mark.shape == ()
    assert int(fingerprint(x.clone())) == int(mark)
    seen = {int(mark)}
    raw = x.view(torch.uint8)
    for at in {0, len(raw) // 2, len(raw) - 1}:
        for bit in (0, 7):
            raw[at] ^= 1 << bit
            seen.add(int(fingerprint(x)))
            raw[at] ^= 1 << bit
    assert len(seen) == 1 + 2 * len({0, len(raw) // 2, len(raw) - 1})
    assert int(fingerprint(x)) == int(mark)


@pytest.mark.parametrize("n", [1000, WIDTH, AT_ONCE, 3 * AT_ONCE + 17])
def test_what_it_allocates_is_bounded_and_estimated(n):
    from estimators.measure import traced

    x = torch.randn(n)
    expected = looking(n, {"offload_gradients": "early"})
    assert expected <= traced(("look", lambda: fingerprint(x))).peak <= expected + 1024
    assert looking(n, {"offload_gradients": True}) == 0


def test_fingerprints_of_what_happens_to_gradients():
    """Signs that cancel in every row and column, halves, exchanged rows and elements, shifts: all differ."""
    a, b = torch.randn(512).abs(), torch.randn(512).abs()
    a[::2] *= -1
    b[1::2] *= -1
    g = torch.outer(a, b)
    others = [
        g,
        -g,
        g * 2,
        g * 0.5,
        g.T,
        g.flip(0),
        g.flip(1),
        g.roll(1, 0),
        g.roll(1, 1),
        g * 0,
        g.abs(),
        g + 1,
        g[torch.randperm(512)],
        torch.where(g > 0, g, -0.0),
        torch.where(g > 0, g, 0.0),
    ]
    for width in (512, 2, 4):  # of small tensors too
        marks = [int(fingerprint(x[:width, :width].contiguous())) for x in others]
        assert len(set(marks)) == len(others), width
    assert_same_bits(g, torch.outer(a, b))
