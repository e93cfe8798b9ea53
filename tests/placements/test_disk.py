"""State in a directory: it survives the process, takes no more room than it needs, and reads as ordinary tensors."""

import pytest
import torch
from torch import nn

import memopt
from memopt.layout.chunks import PAGE
from memopt.placements.arena import Arena
from memopt.placements.entry import Room
from tests.helpers.cases import assert_same_bits, odd_model
from tests.placements.test_placements import assert_same, drive

SPECS = ["adamw", "adamw-8bit", "adafactor-32bit"]


def state_of(opt):
    return [{k: t.clone() for k, t in opt.state[p].items()} for g in opt.param_groups for p in g["params"]]


@pytest.mark.parametrize("spec", SPECS)
def test_a_new_optimizer_goes_on_where_the_last_one_stopped(tmp_path, spec):
    model = odd_model()
    opt = memopt.create(model, f"{spec}@disk", directory=tmp_path, workspace="1MiB")
    drive(model, opt, 0, 3)
    assert opt.ledger() == memopt.price(model, f"{spec}@disk", directory=tmp_path, workspace="1MiB")
    opt.close()
    again = memopt.create(model, f"{spec}@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match=r"state of earlier steps is in .* has stepped 3 times"):
        drive(model, again, 3, 3)
    twin = odd_model()
    reference = memopt.create(twin, spec)
    drive(twin, reference, 0, 6)
    assert_same((model, again), (twin, reference))
    assert "committed after every step" in again.explain()


def test_the_directory_is_read_by_init_state_and_a_part_of_it_stays(tmp_path):
    """Parameters that have no gradient in the first step keep what the directory has of them."""
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 2)
    before = state_of(opt)
    opt.close()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    model.zero_grad()
    model.vector.grad = torch.ones_like(model.vector)
    with pytest.warns(UserWarning, match="state of earlier steps"):
        opt.step()
    opt.close()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match="state of earlier steps"):
        opt.init_state()
    for p, old in zip(model.parameters(), before, strict=True):
        assert opt.state[p]["step"] == (3 if p is model.vector else 2)
        if p is not model.vector:
            assert_same_bits(opt.state[p]["exp_avg"], old["exp_avg"])


def test_without_direct_reads_it_is_the_same_and_says_so(tmp_path, monkeypatch):
    from memopt.placements import arena

    monkeypatch.setattr(arena, "_open_direct", lambda path: None)
    model, twin = odd_model(), odd_model()
    opt, reference = memopt.create(model, "adamw-4bit@disk", directory=tmp_path), memopt.create(twin, "adamw-4bit")
    drive(model, opt, 0, 5)
    drive(twin, reference, 0, 5)
    assert_same((model, opt), (twin, reference))
    assert "through the page cache" in opt.explain()


def test_room_is_given_back(tmp_path):
    """Loading, converting and moving away leave no more on the disk than the state takes."""
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 1)
    path = next(tmp_path.glob("state-*"))
    used = path.stat().st_blocks
    for _ in range(5):
        opt.load_state_dict(opt.state_dict())
    assert path.stat().st_blocks <= 1.2 * used
    opt.convert_("adamw-8bit@disk")
    drive(model, opt, 1, 1)
    assert path.stat().st_blocks < 0.6 * used
    opt.convert_("adamw-8bit")
    assert not path.exists()
    memopt.create(model, "adamw@disk", directory=tmp_path).init_state()  # and a later run does not find it


def test_a_state_dict_outlives_what_it_was_taken_from(tmp_path):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 1)
    old = {k: t for k, t in opt.state[model.vector].items() if k != "step"}
    values = {k: t.clone() for k, t in old.items()}
    opt.load_state_dict(opt.state_dict())
    opt.convert_("lion@disk")
    drive(model, opt, 1, 1)
    for key, value in old.items():
        assert_same_bits(value, values[key], key)


def test_a_named_directory_is_not_copied(tmp_path):
    import copy

    opt = memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    with pytest.raises(TypeError, match="an optimizer with a directory cannot be pickled or copied"):
        copy.deepcopy(opt)


@pytest.mark.parametrize(
    ("spec", "options"), [("adamw@disk", {"workspace": "8MiB"}), ("adamw@paged", {"resident": "16MiB"})]
)
def test_memory_does_not_grow_with_the_state(spec, options):
    """A small version of benchmarks/offload.py: 128 MiB of state through a few."""
    import psutil

    params = [nn.Parameter(torch.randn(1024, 2048).bfloat16()) for _ in range(8)]
    for p in params:
        p.grad = torch.randn(p.shape).bfloat16()
    opt = memopt.create(params, spec, nonfinite="propagate", **options)
    process = psutil.Process()
    opt.step()
    before = process.memory_info().rss
    for _ in range(3):
        opt.step()
    assert opt.ledger().by("lifetime")["persistent"] > 128 * 2**20
    assert process.memory_info().rss - before < 8 * 2**20
    total = sum(float(s["exp_avg"].abs().sum()) for s in opt.state.values())  # reads all of it, as a checkpoint does
    assert total > 0
    opt.step()
    assert process.memory_info().rss - before < 32 * 2**20


@pytest.mark.parametrize("named", [True, False])
def test_small_parameters_are_read_and_written_together(tmp_path, named, monkeypatch):
    requests = []
    for what in ("read", "write"):
        act = getattr(Arena, what)
        monkeypatch.setattr(Arena, what, lambda *a, act=act, what=what: (requests.append(what), act(*a))[1])
    params = [nn.Parameter(torch.ones(40)) for _ in range(20)]
    opt = memopt.create(params, "adamw@disk", **({"directory": str(tmp_path / "run")} if named else {}))
    for _ in range(3):
        requests.clear()
        for p in params:
            p.grad = torch.ones(40)
        opt.step()
        assert sorted(requests) == ["read", "write"]
    opt.close()


def test_room_that_nobody_takes_is_given_back():
    arena = Arena(None, "disk")
    room = Room(arena, 3 * PAGE, copies=2)
    assert room.take(2 * PAGE) == [0, 3 * PAGE]
    assert room.take(2 * PAGE) is None
    room.close()
    assert arena.end == 5 * PAGE
    assert arena.allocate(PAGE) == 5 * PAGE
    arena.close()
