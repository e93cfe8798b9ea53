"""What overlaps when gradients go to the host in backward(), and what is freed, by a simulated device's trace."""

import weakref
from itertools import pairwise

import pytest
import torch

import memopt
from memopt.placements.gradients.offload import OffloadedGradient
from memopt.placements.transfer import device as transfer
from tests.helpers import simulated
from tests.helpers.cases import train
from tests.helpers.offloading import EVEN, Deep, early_twins, narrow, on_clock, twins
from tests.placements.test_placements import assert_same

#: ``offload_gradients`` -> what happens beside what in one backward pass and step.
TIMELINES = {
    False: "backward|01234567                  |\n"
    "down  |        0011223344556677  |\n"
    "host  |          0 1 2 3 4 5 6 7 |\n"
    "up    |           0 1 2 3 4 5 6 7|",
    "early": "backward|01234567              |\n"
    "down  | 0123   456788990011  |\n"
    "host  |         0123 4 5 6 7 |\n"
    "up    |          0123 4 5 6 7|",
}


def overlap(ops, others):
    """How many of these operations have one of the others beside them."""
    return sum(any(o.begin < op.end and op.begin < o.end for o in others) for op in ops)


def test_copies_overlap_backward_and_wait_for_it(device):
    (model, opt), _ = twins("adamw@cpu", narrow)
    on_clock(device, model)
    model(0).backward()
    clock = device.clock
    assert clock.timeline() == ("backward|01234567 |\ndown  | 01234567|")
    for made, came in zip(clock.of("backward"), clock.of("down"), strict=True):
        assert came.begin >= made.end
    opt.step()
    assert clock.of("host")[0].begin >= clock.of("down")[7].end


def test_copies_of_a_further_pass_are_added_beside_it(device):
    made = twins("adamw@cpu", narrow)  # an optimizer that nobody refers to leaves gradients alone
    model = made[0][0]
    on_clock(device, model)
    model(0).backward()
    model(1).backward()
    assert device.clock.timeline() == (
        "backward|0123456789012345  |\ndown  | 0123456789012345 |\napart |          01234567|"
    )


def test_released_the_step_overlaps_backward_too(device):
    (model, opt), twin = twins("adamw@cpu", narrow)
    opt.release_gradients(model)
    on_clock(device, model)
    for m, o in ((model, opt), twin):
        train(m, o, 0, 3)
    assert_same((model, opt), twin)
    assert all(p.grad is None for p in model.parameters())
    clock = device.clock
    backward, steps, ups = clock.of("backward"), clock.of("host"), clock.of("up")
    assert len(backward) == len(steps) == len(ups) == 3 * 8
    assert overlap(steps, backward) >= 3 * 2, clock.timeline()  # of which the last is under way when backward() ends
    assert overlap(ups, backward) >= 3 * 2, clock.timeline()
    gradients = [op for op in clock.of("down") if any(op.begin == made.end for made in backward)]
    assert len(gradients) >= 3 * 4, clock.timeline()  # at once; the others wait for a parameter that goes down
    for i, (made, step) in enumerate(zip(backward, steps, strict=True)):
        assert step.begin >= made.end, i
    assert opt.ledger() == memopt.price(model, opt.spec, device="cuda")


def test_gradients_leave_the_device_and_no_more_than_the_workspace_is_on_the_way(device, monkeypatch):
    """The device's memory is what is referred to; a copy that has not been made refers to what it copies."""
    (model, opt), _ = twins("adamw@cpu", Deep)  # a workspace of 1 MiB; each gradient takes 400 KiB
    alive, numbers, real = weakref.WeakSet(), [], OffloadedGradient.stand_in

    def stand_in(self, p, g):
        alive.add(g)
        numbers.append(len(alive))
        real(self, p, g)

    monkeypatch.setattr(OffloadedGradient, "stand_in", stand_in)
    on_clock(device, model)
    for seed in range(2):
        model(seed).backward()
        assert 2 <= max(numbers) <= 3, numbers
        memopt.clip_grad_norm_(opt, 1.0)  # waits for all
        assert not list(alive), "every gradient is on the host"


def test_a_slow_bus_holds_backward_up_instead_of_filling_the_device(monkeypatch):
    costs = {**EVEN, "down": (3.0, 0.0)}
    made = simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(costs))
    monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where: made)
    pairs = twins("adamw@cpu", Deep)  # an optimizer that nobody refers to leaves gradients alone
    model = pairs[0][0]
    on_clock(made, model)
    model(0).backward()
    down = made.clock.of("down")
    assert all(later.begin == earlier.end for earlier, later in pairwise(down)), made.clock.timeline()
    waiting = [sum(d.begin > b.end for d in down[: i + 1]) for i, b in enumerate(made.clock.of("backward"))]
    assert max(waiting) <= 2, made.clock.timeline()


@pytest.mark.parametrize("how", TIMELINES)
def test_copies_overlap_backward_and_the_step_begins_at_once(device, how):
    """A second for each gradient and each step, and on the device transfer for each parameter or gradient; each of four
    buffers
    holds one parameter and its gradient (docs/placements.md)."""
    (model, opt), _ = early_twins(workspace="1MiB", offload_gradients=how)
    train(model, opt, 0, 1)
    on_clock(device, model)
    opt.zero_grad()
    clock = device.clock = simulated.Streams({**EVEN, "down": (0.0, 1 / 102_400)})
    model(1).backward()
    opt.step()
    assert clock.timeline() == TIMELINES[how]


@pytest.mark.parametrize("slow", [1.0, 4.0])
def test_what_came_early_does_not_come_down_again(monkeypatch, slow):
    """Copies that take as long as what they move: the step is shorter by all the time for which the device transfer
    carried
    gradients while backward() computed others."""
    ends = {}
    for how in (False, "early"):
        costs = {**EVEN, "down": (0.0, slow / 102_400), "up": (0.0, 1 / 102_400), "host": (0.25, 0.0)}
        made = simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(costs))
        monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where, made=made: made)
        (model, opt), _ = early_twins(offload_gradients=how)
        on_clock(made, model)
        train(model, opt, 0, 1)
        began = made.clock.now
        opt.zero_grad()
        model(1).backward()
        done = made.clock.of("backward")[-1].end
        opt.step()
        ends[how] = made.clock.now - done
        assert done - began == 8.0  # backward() waits for nothing
        assert made.clock.of("host")[-1].end <= made.clock.now
    assert ends[False] - ends["early"] == 7.0, ends
