"""The freeze test: large then 100 × smaller gradients on three quarters of each block, 3000 steps, b2 = 0.999.

Rounded to nearest, 8-bit codes stay at 0.9 where the truth is 0.013. Every format is run; one that does not follow the
truth has to say so in NOT_FAITHFUL, and the test holds it to that too.
"""

import pytest
import torch

import memopt
from memopt.core.rows import Rows
from memopt.formats import FORMATS, Shard
from memopt.layout.param import resolve_layout

ROWS, COLS = 16, 256
LARGE, SMALL = 300, 3000
FACTOR = 1.5

#: format -> why it does not follow single elements. docs/formats.md says the same.
NOT_FAITHFUL = {"factored": "a matrix of rank one cannot hold a pattern that differs from row to row"}
#: Formats whose single elements scatter by more than FACTOR around a mean that follows.
SCATTERED = {"fp8", "4bit"}


def second_moment(fmt):
    """(stored, true) second moments of the elements whose gradient became small."""
    g = torch.Generator().manual_seed(0)
    order = torch.rand(ROWS, COLS, generator=g).argsort(1)
    drops = order < COLS * 3 // 4
    p = torch.zeros(ROWS, COLS, requires_grad=True)
    opt = memopt.create([p], f"adamw-{fmt}" if fmt != "32bit" else "adamw", lr=0.0)
    truth = torch.zeros(ROWS, COLS, dtype=torch.float64)
    for t in range(LARGE + SMALL):
        p.grad = torch.where(drops & (t >= LARGE), 0.01, 1.0)
        opt.step()
        truth = 0.999 * truth + 0.001 * p.grad.double() ** 2
    rows = Rows.whole((ROWS, COLS))
    second = resolve_layout(opt.spec, opt.param_groups[0], "0", 0, rows, "float32").moments[1]
    assert second.format is FORMATS[fmt]
    return second.format.read(second.parts(opt.state[p]), second.moment, Shard(rows)).double()[drops], truth[drops]


@pytest.mark.parametrize("fmt", FORMATS)
def test_second_moments_follow_shrinking_gradients(fmt):
    stored, truth = second_moment(fmt)
    ratio = stored / truth
    follows = 1 / FACTOR <= ratio.mean() <= FACTOR
    assert follows == (fmt not in NOT_FAITHFUL), f"mean ratio {ratio.mean():.3f}"
    every = bool(((ratio >= 1 / FACTOR) & (ratio <= FACTOR)).all())
    assert every == (fmt not in SCATTERED and fmt not in NOT_FAITHFUL), f"{ratio.min():.3f} … {ratio.max():.3f}"


def test_what_the_test_is_about_rounding_to_nearest_freezes():
    """The same run in torch.optim's way with bf16 state: the moment never moves. If it did, this file tests nothing."""
    v = torch.full((64,), 0.26, dtype=torch.bfloat16)
    start = v.clone()
    for _ in range(SMALL):
        v.mul_(0.999).add_(0.001 * 0.01**2)
    assert torch.equal(v, start)


def test_the_default_formats_are_faithful():
    defaults = {rule.default_format for rule in memopt.rules.RULES.values() if rule.name not in ("adafactor", "came")}
    assert not defaults & (set(NOT_FAITHFUL) | SCATTERED)
