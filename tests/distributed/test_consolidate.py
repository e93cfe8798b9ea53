"""``/zero1`` in other people's checkpoints: all rows in one dictionary, and from it to any number of ranks."""

import copy
import warnings

import pytest
import torch
from torch import nn

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits

SPECS = ("adamw", "adamw-8bit", "adafactor", "lion-4bit")
MASTERED = "adamw-8bit+split"


def model(spec):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(70, 65), nn.Linear(65, 67))
    return net.bfloat16() if "+" in spec else net


def drive(net, opt, first, stop):
    for step in range(first, stop):
        g = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()


def collected():
    """On each of some ranks, for each spec: the dictionary after two steps, the one of ``to``'s neighbours, and after
    two more steps."""
    found = {}
    for spec in (*SPECS, MASTERED):
        net = model(spec)
        opt = memopt.create(net, f"{spec}/zero1", lr=1e-2)
        drive(net, opt, 0, 2)
        opt.state[next(net.parameters())]["note"] = 7
        opt.consolidate_state_dict(to=1)
        first = copy.deepcopy((opt.state_dict(), net.state_dict()))
        drive(net, opt, 2, 4)
        after_a_step = opt.state_dict()["memopt"]["world_size"]
        opt.consolidate_state_dict(to=None)
        found[spec] = first, after_a_step, copy.deepcopy((opt.state_dict(), net.state_dict()))
    return found


def resumed(saved):
    """The same from the dictionary of :func:`collected`, on as many ranks as there are."""
    found = {}
    for spec, (state, weights) in saved.items():
        net = model(spec)
        net.load_state_dict(weights)
        opt = memopt.create(net, f"{spec}/zero1", lr=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.load_state_dict(state)
        drive(net, opt, 2, 4)
        opt.consolidate_state_dict()
        found[spec] = copy.deepcopy((opt.state_dict(), net.state_dict()))
    return found


@pytest.fixture(scope="module")
def of_three():
    return ranks.run(collected, 3)


def same(a, b):
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        assert state.keys() == b["state"][number].keys()
        for key, x in state.items():
            if isinstance(x, torch.Tensor):
                assert_same_bits(x, b["state"][number][key], f"{number} {key}")
            else:
                assert x == b["state"][number][key]


@pytest.mark.parametrize("spec", [*SPECS, MASTERED])
def test_one_rank_has_what_one_process_would_have(of_three, spec):
    net = model(spec)
    alone = memopt.create(net, spec, lr=1e-2)
    (state, _), after_a_step, _ = of_three[1][spec]
    assert (state["memopt"]["rank"], state["memopt"]["world_size"], after_a_step) == (0, 1, 3)
    alone.load_state_dict(state)  # its layout is that of one process, whatever the bits
    if spec in ("adamw", "adamw-8bit", "lion-4bit"):
        drive(net, fresh := memopt.create(net, spec, lr=1e-2), 0, 2)
        fresh.state[next(net.parameters())]["note"] = 7
        same(state, fresh.state_dict())
    others = [of_three[rank][spec][0][0]["memopt"]["world_size"] for rank in (0, 2)]
    assert others == [3, 3]


@pytest.mark.parametrize("world", [1, 2])
def test_other_numbers_of_ranks_go_on_bit_for_bit(of_three, world):
    saved = {spec: found[0] for spec, found in of_three[1].items()}
    for spec, (state, weights) in ranks.run(resumed, world, saved)[0].items():
        wanted, there = of_three[0][spec][2]
        if spec == "adafactor":  # its sums over ranks are taken in another order
            continue
        same(state, wanted)
        for key, x in weights.items():
            assert_same_bits(x, there[key], key)


def test_without_ranks_there_is_nothing_to_collect():
    net = model("adamw")
    opt = memopt.create(net, "adamw-8bit")
    drive(net, opt, 0, 1)
    opt.consolidate_state_dict()
    saved = opt.state_dict()
    assert saved["memopt"]["world_size"] == 1
    assert all(saved["state"][i][key] is x for i, p in enumerate(net.parameters()) for key, x in opt.state[p].items())


def test_every_change_of_the_state_drops_what_was_collected(tmp_path):
    model = torch.nn.Linear(8, 4)
    opt = memopt.create(model, "adamw-8bit/zero1")
    model(torch.ones(1, 8)).sum().backward()
    memopt.save(tmp_path, optimizer=opt)
    changes = {
        "init_state": opt.init_state,
        "step": opt.step,
        "state_dict": lambda: opt.load_state_dict(opt.state_dict()),
        "load": lambda: memopt.load(tmp_path, optimizer=opt),
        "rows": lambda: opt.reset_state(step=0),
        "convert": lambda: opt.convert_("adamw/zero1"),
        "anew": lambda: opt.init_state(anew=True),
    }
    for name, change in changes.items():
        opt.integrity.snapshot = (None,)
        change()
        assert opt.integrity.snapshot == (), name
