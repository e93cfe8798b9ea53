"""The tables that the Triton kernels read, and what they cost."""

from __future__ import annotations

import pytest
import torch

import memopt
from memopt import kernels
from memopt.core.rows import Rows
from memopt.layout.param import resolve_layout
from memopt.layout.param_step import Work
from memopt.rules import RULES
from tests.helpers.cases import assert_same_bits
from tests.helpers.interpreting import DEVICE, gradients, parameters, stepped

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("interpreted")


def test_division_by_multiplication() -> None:
    from memopt.kernels.triton.tables import division

    for divisor in [1, 2, 3, 5, 7, 16, 56, 57, 224, 1000, 65535, 2**20 + 1, 2**31 - 1]:
        magic, shift = division(divisor)
        assert magic < 2**32
        for n in {0, 1, divisor - 1, divisor, 2 * divisor - 1, 12345678, 2**31 - 1, 2**31 - 1 - divisor}:
            if 0 <= n < 2**31:
                assert (2 * n * magic >> 32) >> shift == n // divisor


def test_programs_cover_every_block_once() -> None:
    from memopt.kernels.triton.tables import PROGRAMS, pieces_of_programs, programs

    found = programs([3, 5, 7], [5, 0, 4], 2).tolist()
    assert found == [[3, 0], [3, 2], [3, 4], [7, 0], [7, 2]]
    blocks = 70_000_000_000 // 256
    run = pieces_of_programs(blocks, 4, 256)
    assert blocks / (run * 4) <= PROGRAMS


def test_launchers_without_a_plan_are_found_again_and_bounded(on) -> None:
    from memopt.kernels.triton import cached_step
    from memopt.kernels.triton.launchers import Launchers

    on(True)
    spec, device = memopt.parse("adamw-8bit"), torch.device(DEVICE)
    described = []
    for shape in [(17, 300), (33,), (5, 70)]:
        [p], _, opt = stepped(spec, {}, on, 1, [shape], plain_steps=0)
        p.grad = torch.zeros_like(p)
        layout = resolve_layout(spec, opt.param_groups[0], "0", 0, Rows.whole(tuple(p.shape)), "float32")
        opt.init_state()
        work = Work(layout, p, p.grad, opt.state[p], 1, opt.param_groups[0])
        described.append(cached_step.describe_all([work], 0, opt.param_groups, False))
    rule = RULES[spec.rule]
    size = cached_step.Launcher(rule, described[0], device, 1).nbytes
    kept = Launchers(2 * size + size // 2)
    first, second = (kept.find(rule, made, device, 1)[0] for made in described[:2])
    assert kept.find(rule, described[0], device, 1) == (first, [0])
    kept.find(rule, described[2], device, 1)  # takes the place of the one met longest ago
    assert kept.find(rule, described[0], device, 1)[0] is first
    assert kept.find(rule, described[1], device, 1)[0] is not second

    kept = Launchers(2**20)
    a, b, c = (made[0] for made in described)
    pair, _ = kept.find(rule, [a, b], device, 1)
    both, places = kept.find(rule, [b, c], device, 1)  # others than before: one launcher has all of them
    assert both is not pair
    assert places == [0, 1]
    assert kept.find(rule, [a, b], device, 1) == (both, [2, 0])
    assert kept.find(rule, [c], device, 1) == (both, [1])


def test_without_a_plan_what_has_no_gradient_stays_as_it_is(on, monkeypatch) -> None:
    """One launcher takes every step but the first, and the bits are those of launchers made anew for each."""
    from memopt.kernels.triton import cached_step
    from memopt.kernels.triton.launchers import Launchers

    class Forgetful(Launchers):
        def find(self, *arguments):
            return Launchers(2**20).find(*arguments)

    on(True)
    monkeypatch.setattr(kernels, "make_cached_step", lambda *_: None)
    found, launchers = [], Launchers(2**20)
    for cache in (Forgetful(0), launchers):
        monkeypatch.setattr(cached_step, "_LAUNCHERS", cache)
        params = parameters([(9, 70), (33,), (5, 64)])
        opt = memopt.create(params, "adafactor")
        for step, there in enumerate([(0, 1), (0, 1, 2), (1, 2), (0, 2)]):
            gradients(params, step)
            for i, p in enumerate(params):
                p.grad = p.grad if i in there else None
            opt.step()
        assert [int(opt.state[p]["step"]) for p in params] == [3, 3, 3]
        found.append([x for p in params for x in (p.detach(), *opt.state[p].values())])
    for x, y in zip(*found, strict=True):
        assert_same_bits(x, y)
    assert len(launchers) == 1


def test_vectors_that_are_cut_anywhere_and_dithered_take_the_plain_path(on) -> None:
    from memopt.kernels.triton import tables

    on(True)
    rows, hyper = Rows((600,), 0, 600, 1), {"betas": (0.9, 0.999), "amsgrad": False}
    for master, refused in (("split", True), ("stochastic", True), ("kahan", False)):
        spec = memopt.parse("adamw").replace(master=master)
        p = torch.zeros(600, dtype=torch.bfloat16, device=DEVICE)
        reason = tables.refuse(resolve_layout(spec, hyper, "p", 0, rows, "bfloat16"), p, 1)
        assert (reason is not None) == refused, (master, reason)


@pytest.mark.parametrize("spec", ["adamw-8bit", "adafactor", "adammini"])
def test_the_tables_cost_what_the_estimate_says(spec, on) -> None:
    """What a step allocates beside the state, against the closed form of ``memopt estimate``."""
    from estimators.memory.state import kernel_tables

    on(True)
    shapes = [(300, 256), (17, 300), (33,)]
    _, _, opt = stepped(spec, {}, on, 2, shapes, plain_steps=0)
    launcher = opt.stepper.plan.launcher
    seen: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()

    for value in vars(launcher).values():
        count(value)
    count(launcher.gradients.tensor)
    count(launcher.numbers.tensor)
    for launch in [*launcher.launches, *launcher._look._launches]:
        for cell in launch.__closure__ or ():
            for value in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
                count(value)
    used = sum(seen.values()) + launcher.workspace * 4
    claimed = kernel_tables(
        len(shapes), sum(torch.Size(s).numel() for s in shapes), spec == "adafactor", spec == "adammini"
    )
    assert used <= claimed
