"""Where state lives does not change what a step computes: every placement against ``device``, bit for bit."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows
from memopt.layout import chunks
from memopt.layout.param import resolve_layout
from memopt.placements import PLACEMENTS
from memopt.placements.stores.by_placement import chunked
from memopt.placements.transfer import device as transfer
from memopt.placements.transfer.pipeline import Operation, run_chains
from tests.helpers import simulated
from tests.helpers.cases import ENDINGS, HYPER, PLAIN_SPECS, assert_same_bits, live_nbytes, odd_model, thinned

STEPS = 50
ELSEWHERE = [name for name in PLACEMENTS if name != "device"]
#: Small enough that the odd model's matrices are cut into several chunks.
SMALL = {"disk": {"workspace": 2**20}, "paged": {"resident": 2**20}, "host": {"workspace": 2**20}, "cpu": {}}
#: Every rule in every format, each with one placement, in turn. And a few with all of them.
CASES = [(spec, ELSEWHERE[i % len(ELSEWHERE)]) for i, spec in enumerate(PLAIN_SPECS)]
FEW = ("adamw", "adamw-8bit", "adam-factored", "adafactor")
CASES += [(s, at) for s in FEW for at in ELSEWHERE if (s, at) not in CASES]


def drive(model, opt, first, steps):
    """Random gradients that do not depend on the parameters: cheap, and no difference is damped."""
    for step in range(first, first + steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * step + i))
        opt.step()


@pytest.fixture(scope="module")
def on_device():
    """spec -> model and optimizer after the steps, made once."""
    made = {}

    def of(spec):
        if spec not in made:
            torch.manual_seed(0)
            model = odd_model()
            opt = memopt.create(model, spec, **HYPER.get(memopt.parse(spec).rule, {}))
            drive(model, opt, 0, STEPS)
            made[spec] = model, opt
        return made[spec]

    of.cache_clear = made.clear
    return of


def assert_same(a, b):
    """``(model, optimizer)`` twice."""
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert_same_bits(p, q, name)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert_same_bits(value, b[1].state[q][key], f"{name} {key}")


@pytest.mark.parametrize(("spec", "place"), thinned(CASES, 3))
def test_parameters_and_state_are_those_of_device_after_50_steps(on_device, spec, place):
    model = odd_model()
    where = str(memopt.parse(spec).replace(placement=place))
    opt = memopt.create(model, where, **HYPER.get(memopt.parse(spec).rule, {}), **SMALL[place])
    drive(model, opt, 0, STEPS)
    assert_same((model, opt), on_device(spec))
    predicted = memopt.price(model, where, **HYPER.get(memopt.parse(spec).rule, {}), **SMALL[place])
    assert opt.ledger() == predicted
    assert live_nbytes(opt) == predicted.nbytes


def against_device(spec, place, on_device, **options):
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    model = odd_model()
    opt = memopt.create(model, str(memopt.parse(spec).replace(placement=place)), **hyper, **options)
    drive(model, opt, 0, STEPS)
    assert_same((model, opt), on_device(spec))
    opt.close()


@pytest.mark.slow
@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_every_rule_and_format_in_every_place(monkeypatch, tmp_path, on_device, spec):
    """All of them, and on the simulated device: with its gradients there and on the host."""
    for place in ELSEWHERE:
        against_device(spec, place, on_device, **SMALL[place])
    against_device(spec, "disk", on_device, directory=tmp_path, workspace="1MiB")
    device = simulated.DeviceTransfer(torch.device("cpu"))
    monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where: device)
    for place in ("host", "disk", "cpu"):
        against_device(spec, place, on_device, workspace="1MiB")
    against_device(spec, "cpu", on_device, workspace="1MiB", offload_gradients=True)
    on_device.cache_clear()


@pytest.mark.parametrize("place", ELSEWHERE)
def test_an_ordinary_optimizer(on_device, place):
    """Scheduler, clipping, accumulation, a closure, save and load, a copy, and a parameter without a gradient."""

    def run(spec, reload, **options):
        torch.manual_seed(0)
        model = odd_model()
        opt = memopt.create(model, spec, lr=1e-2, **options)
        rates = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        for step in range(6):
            opt.zero_grad()
            for half in (0, 1):
                (model(2 * step + half) / 2).backward()
            if step == 1:
                model.wide.weight.grad = None
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert opt.step(lambda: 7.0) == 7.0
            rates.step()
            if reload and step == 2:
                opt.load_state_dict(opt.state_dict())
            if reload and step == 3:
                model, opt = copy.deepcopy((model, opt))
            if reload and step == 4:
                model, opt = pickle.loads(pickle.dumps((model, opt)))
                model.head.weight = model.embedding.weight
        return model, opt

    assert_same(run("adamw-8bit", False), run(f"adamw-8bit@{place}", True, **SMALL[place]))


@pytest.mark.parametrize("place", ELSEWHERE)
def test_from_place_to_place_in_mid_run(tmp_path, on_device, place):
    model, opt = odd_model(), None
    opt = memopt.create(model, "adamw-8bit")
    for i, name in enumerate(("device", place, "device", "disk", place)):
        options = {"directory": tmp_path / "d"} if name == "disk" else {}
        opt.convert_(f"adamw-8bit@{name}", **options)
        drive(model, opt, 10 * i, 10)
    assert_same((model, opt), on_device("adamw-8bit"))


@pytest.mark.parametrize("place", ELSEWHERE)
def test_checkpoints_cross_placements(tmp_path, place):
    model = odd_model()
    opt = memopt.create(model, f"adamw-8bit@{place}", **SMALL[place])
    drive(model, opt, 0, 2)
    memopt.save(tmp_path, model=model, optimizer=opt)
    other = odd_model()
    there = memopt.create(other, "adamw-8bit")
    memopt.load(tmp_path, model=other, optimizer=there)
    assert_same((model, opt), (other, there))
    back = memopt.create(other, f"adamw-8bit@{place}", **SMALL[place])
    back.init_state()
    memopt.load(tmp_path, optimizer=back)
    assert_same((model, opt), (other, back))


def test_placements_of_some_parameters():
    model, twin = odd_model(), odd_model()
    opt = memopt.create(model, "adamw-8bit", overrides={"embed*": "@disk", "wide.*": "4bit@paged", "conv.*": "@host"})
    reference = memopt.create(twin, "adamw-8bit", overrides={"wide.*": "4bit"})
    drive(model, opt, 0, 5)
    drive(twin, reference, 0, 5)
    assert_same((model, opt), (twin, reference))
    assert opt.ledger() == memopt.price(model, opt.spec)
    assert {"disk", "paged:cpu", "cpu"} == set(opt.ledger().by("location"))


def test_nan_skips_a_step_and_changes_nothing():
    model = odd_model()
    opt = memopt.create(model, "adamw@disk")
    drive(model, opt, 0, 1)
    before = {k: t.clone() for k, t in opt.state[model.vector].items()}
    model.vector.grad[5] = float("nan")
    with pytest.warns(UserWarning, match="this step was skipped"):
        opt.step()
    for key, value in opt.state[model.vector].items():
        assert_same_bits(value, before[key])


# How state is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(700, 801), (5, 129, 65), (10_000,), (4097, 64), (3, 5), ()])
@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_pieces_are_the_whole_without_overlap_or_gap(spec, shape):
    parsed = memopt.parse(spec)
    one = chunked(resolve_layout(parsed, parsed.resolve(HYPER.get(parsed.rule)), "w", 0, Rows.whole(shape), "float32"))
    found = chunks.pieces("w", *one[:3], target=40_000)
    assert [p.rows.first for p in found[1:]] == [p.rows.stop for p in found[:-1]]
    ends: dict[str, int] = {}
    for p in found:
        for part in p.parts:
            assert part.offset == ends.get(part.key, 0)
            ends[part.key] = part.offset + part.nbytes
    assert ends == {line.key: line.nbytes for line in one.layout(one.rows)}
    size = chunks.extent(*one[:3], target=40_000)
    assert size == (max(p.nbytes for p in found), sum(p.nbytes for p in found))
    if len(found) > 1:
        assert size.largest <= 40_000 or found[0].rows.count == 1


def test_a_large_matrix_is_cut_and_buffers_stay_within_the_workspace():
    shapes = {"embed": (128_256, 4096), "q": (4096, 4096), "norm": (4096,)}
    for place in ("disk", "host"):
        lines = memopt.price(shapes, f"adamw@{place}", device="cuda", workspace="64MiB")
        buffers = [line for line in lines if line.moment == "buffers"]
        assert {line.lifetime for line in buffers} == {"workspace"}
        assert all(0 < line.nbytes <= 64 * 2**20 and line.shape[0] >= 3 for line in buffers)
    whole = memopt.price(shapes, "adafactor-32bit@host", device="cuda", workspace="64MiB")
    assert whole.by("moment")["buffers"] == 4 * 128_256 * 4096  # a rule that needs all of it at once


# What overlaps --------------------------------------------------------------------------------------------------


def test_copies_and_steps_overlap():
    """Streams of equal cost. With one buffer nothing overlaps; with three, all streams work all the time."""
    for buffers, seconds in ((1, 30), (2, 16), (3, 12), (4, 12)):
        streams = simulated.Streams({})
        run_chains([[Operation(stream, lambda i: None) for stream in ("up", "step", "down")]] * 10, streams, buffers)
        assert max(op.end for op in streams.trace) == seconds, streams.timeline()
    assert streams.timeline() == ("up    |0123456789  |\nstep  | 0123456789 |\ndown  |  0123456789|")


def test_a_slow_lane_is_never_idle():
    streams = simulated.Streams({"up": (1.0, 0.0), "step": (3.0, 0.0), "down": (2.0, 0.0)})
    run_chains([[Operation(stream, lambda i: None) for stream in ("up", "step", "down")]] * 8, streams, 4)
    steps = streams.of("step")
    assert all(later.begin == earlier.end for earlier, later in pairwise(steps)), streams.timeline()
    assert max(op.end for op in streams.trace) == 1 + 8 * 3 + 2


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit", "adafactor-8bit", "lion-4bit"])
@pytest.mark.parametrize(
    ("place", "fetch", "compute"), [("host", "up", "step"), ("disk", "up", "step"), ("cpu", "down", "host")]
)
def test_streaming_through_a_simulated_device(monkeypatch, on_device, spec, place, fetch, compute):
    """The state comes through the device's buffers, full of rubbish, in the order of the clock; the result is that of
    ``device``, and while a chunk is stepped others are on the device transfer."""
    device = simulated.DeviceTransfer(torch.device("cpu"))
    monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where: device)
    model = odd_model()
    opt = memopt.create(model, f"{spec}@{place}", workspace="1MiB", **HYPER.get(memopt.parse(spec).rule, {}))
    drive(model, opt, 0, STEPS)
    assert_same((model, opt), on_device(spec))
    streams = device.runs[-1]
    if spec == "adamw":
        steps, copies = streams.of(compute), streams.of(fetch)
        assert len(copies) > 3
        overlapped = [s for s in steps if any(c.begin < s.end and s.begin < c.end for c in copies)]
        assert len(overlapped) >= len(steps) - 2, streams.timeline()
        assert max(op.end for op in streams.trace) < 0.6 * sum(streams.busy.values()), streams.timeline()


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("adamw", {"directory": "/x"}, r"directory='/x' is for @disk; this spec is @device"),
        ("adamw@host", {"resident": 2**30}, r"resident=1073741824 is for @paged; this spec is @host"),
        ("adamw@disk", {"workspace": "much"}, r"workspace='much' is not allowed; it is a number of bytes or a size"),
        ("adamw@disk", {"workspace": 10}, r"workspace=10 is not allowed; it is at least 1,048,576"),
        ("adamw@disk", {"directory": 3}, r"directory=3 is not allowed; it is the path of a directory"),
    ],
)
def test_options_that_mean_nothing(spec, options, words):
    with pytest.raises(SpecError, match=words):
        memopt.create(nn.Linear(2, 2), spec, **options)
    with pytest.raises(SpecError, match=words):
        memopt.price([(2, 2)], spec, **options)


def test_every_placement_has_every_partition():
    assert {place for place, _ in ENDINGS} == set(PLACEMENTS)
    assert len({part for place, part in ENDINGS if place == "disk"}) == len({part for _, part in ENDINGS})
