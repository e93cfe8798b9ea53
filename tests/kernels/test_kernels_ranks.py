"""Sums that kernels take over ranks: how many, of what, and what becomes of an error in one."""

import pytest
import torch

import memopt
from memopt import kernels
from memopt.core.rows import Rows
from memopt.layout.param import resolve_layout
from memopt.layout.param_step import Work

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.missing()}")


def work_of(spec, shape=(40, 24), **hyper):
    """A parameter that ranks share, after one step."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    opt = memopt.create([("w", p)], spec, **hyper)
    opt.step()
    layout = resolve_layout(opt.spec, opt.param_groups[0], "w", 0, Rows.whole(shape), "float32")
    return Work(layout, p.detach(), p.grad, opt.state[p], 2, opt.param_groups[0], ("ranks",))


def run(work, spec, total):
    return kernels.step([work], 2, 0, total)


@pytest.mark.parametrize(
    ("spec", "hyper", "numbers"),
    [
        ("lamb-8bit", {}, [1, 1]),  # RMS of the parameter, of the update
        ("stableadamw", {}, [1]),
        ("adafactor", {}, [24, 1]),  # column means, RMS of the update
        ("adafactor", {"convention": "torch"}, [1, 24, 1]),  # RMS of the parameter before them
        ("adafactor", {"convention": "transformers"}, [1, 24, 1]),
        ("came", {}, [24, 1, 24]),
        ("adamw-factored", {}, [24]),
    ],
)
def test_sums_are_those_of_the_plain_path(spec, hyper, numbers):
    """In number, order, size and value: another rank may be on that path."""
    taken = {}
    for path in ("kernels", "torch"):
        work, sums = work_of(spec, **hyper), []

        def total(x, sums=sums):
            sums.append(x.clone().reshape(-1))
            return x

        if path == "kernels":
            assert run(work, spec, total) == []
        else:
            from memopt.engines.native import plain_step

            plain_step(work, total, 0)
        taken[path] = sums, work.p
    (mine, p), (theirs, q) = taken["kernels"], taken["torch"]
    assert [x.numel() for x in mine] == [x.numel() for x in theirs] == numbers
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_sum_over_two_ranks_is_used():
    """Both ranks have the same rows: twice the sums and twice the elements."""
    alone, shared = work_of("lamb"), work_of("lamb")
    run(alone, "lamb", lambda x: x)
    run(shared._replace(layout=shared.layout.at(Rows((80, 24), 0, 40))), "lamb", lambda x: 2 * x)
    assert torch.equal(alone.p, shared.p)
    run(shared, "lamb", lambda x: 4 * x)
    assert not torch.equal(alone.p, shared.p)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_in_a_sum_is_raised_and_ends_the_step(number):
    work, sums = work_of("adafactor", convention="transformers"), []  # three sums
    before = work.p.clone()

    def total(x):
        sums.append(x)
        if len(sums) > number:
            raise ConnectionError("a rank is gone")
        return x

    with pytest.raises(ConnectionError, match="a rank is gone"):
        run(work, "adafactor", total)
    assert len(sums) == number + 1
    assert torch.equal(work.p, before)
    assert run(work, "adafactor", lambda x: x) == []


def test_rows_that_are_elsewhere_too_are_not_for_kernels():
    work = work_of("lamb")._replace(counted=slice(1, None))
    assert run(work, "lamb", lambda x: x) == [work]
