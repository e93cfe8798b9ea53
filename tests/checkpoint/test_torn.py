"""State that a step, a load or a conversion left in the middle is refused by everything until it is repaired."""

import copy
import pickle

import pytest
import torch

import memopt
from memopt.checkpoint.conversion import replace_state
from memopt.checkpoint.tensorfile import TensorFile
from memopt.core.ledger import Line
from memopt.placements.arena import Arena
from memopt.placements.entry import Entry
from tests.helpers.cases import odd_model
from tests.helpers.saved import assert_same_model, assert_same_state

#: Placements that differ in how a step brings state to where it is stepped.
PLACES = ["adamw", "adamw@paged", "adamw@paged resident", "adamw@host", "adamw@cpu", "adamw@disk", "adamw@disk kept"]


def made(place, folder, seed=0):
    torch.manual_seed(seed)
    spec, _, how = place.partition(" ")
    more = {"resident": {"resident": "1MiB"}, "kept": {"directory": str(folder)}}.get(how, {})
    model = odd_model()
    return model, memopt.create(model, spec, lr=1e-2, **more)


def step(model, opt, number):
    torch.manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()


def refused(opt, model, folder):
    """What must not take the state for whole."""
    return [
        lambda: step(model, opt, 9),
        opt.state_dict,
        lambda: memopt.save(folder / "refused", model=model, optimizer=opt),
        lambda: opt.convert_("adamw-8bit"),
        lambda: memopt.checkpoint.source_of(opt),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
        opt.init_state,
        opt.explain,
        lambda: opt.release_gradients(model),
        lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    ]


def stop_in_step(opt, model, folder, patch, error):
    engine, left = type(opt.engine), [2]
    real = engine.step

    def failing(self, works, partition, seed):
        for work in works:
            left[0] -= 1
            if left[0] < 0:
                raise error
            real(self, [work], partition, seed)

    patch.setattr(engine, "step", failing)
    opt.stepper.plan = None  # the kernels step all parameters in one call
    step(model, opt, 5)


def stop_in_load(opt, model, folder, patch, error):
    real, left = TensorFile.read_into, [20]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error
        real(self, *arguments)

    patch.setattr(TensorFile, "read_into", failing)
    memopt.load(folder / "run", model=model, optimizer=opt)


def stop_in_state_dict(opt, model, folder, patch, error):
    wanted, real, left = copy.deepcopy(opt.state_dict()), torch.Tensor.copy_, [5]

    def failing(self, *arguments, **keywords):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(self, *arguments, **keywords)

    patch.setattr(torch.Tensor, "copy_", failing)
    opt.load_state_dict(wanted)


def stop_in_conversion(opt, model, folder, patch, error):
    def failing(state, new, rule):
        state.clear()
        raise error

    patch.setattr(replace_state, "_replace", failing)
    opt.convert_(str(opt.spec).replace("adamw", "adamw-8bit"))


ERRORS = [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError("no memory")]
STOPS = [stop_in_step, stop_in_load, stop_in_state_dict, stop_in_conversion]


@pytest.mark.filterwarnings("ignore:disk. state of earlier steps")
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_what_stopped_in_the_middle_is_refused_until_it_is_repaired(place, stop, tmp_path, monkeypatch):
    error = ERRORS[(PLACES.index(place) + STOPS.index(stop)) % len(ERRORS)]
    model, opt = made(place, tmp_path / "state")
    for i in range(2):
        step(model, opt, i)
    memopt.save(tmp_path / "run", model=model, optimizer=opt)
    step(model, opt, 2)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        stop(opt, model, tmp_path, patch, error)
    for use in refused(opt, model, tmp_path):
        with pytest.raises(RuntimeError, match=r"stopped in the middle .*Load a checkpoint"):
            use()
    assert not (tmp_path / "refused").exists()
    memopt.load(tmp_path / "run", model=model, optimizer=opt)
    twin_model, twin = made("adamw", None)
    memopt.load(tmp_path / "run", model=twin_model, optimizer=twin)
    for i in (2, 3):
        step(model, opt, i)
        step(twin_model, twin, i)
    assert_same_model(model, twin_model)
    assert_same_state(opt, twin)


def test_state_made_anew_begins_again(monkeypatch, tmp_path):
    model, opt = made("adamw-8bit@disk", None)
    step(model, opt, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_step(opt, model, tmp_path, patch, KeyboardInterrupt())
    opt.init_state(anew=True)
    assert all(not t.float().any() for state in opt.state.values() for t in state.values())
    twin_model = copy.deepcopy(model)
    twin = memopt.create(twin_model, "adamw-8bit", lr=1e-2)
    step(model, opt, 1)
    step(twin_model, twin, 1)
    assert_same_model(model, twin_model)
    assert_same_state(opt, twin)


def test_what_is_loaded_over_torn_state_is_not_that_state(monkeypatch, tmp_path):
    """state_dict() returns the tensors themselves, as torch.optim's does."""
    model, opt = made("adamw", None)
    step(model, opt, 0)
    own = opt.state_dict()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_step(opt, model, tmp_path, patch, KeyboardInterrupt())
    with pytest.raises(ValueError, match=r"the state_dict holds the optimizer's own tensors"):
        opt.load_state_dict(own)


def test_a_model_alone_that_was_half_loaded_is_said(monkeypatch, tmp_path):
    model, _ = made("adamw", None)
    memopt.save(tmp_path / "run", model=model)
    real, left = TensorFile.read_into, [6]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        real(self, *arguments)

    monkeypatch.setattr(TensorFile, "read_into", failing)
    with pytest.raises(OSError, match="Input/output"), pytest.warns(UserWarning, match="partly as it was"):
        memopt.load(tmp_path / "run", model=model)


def test_an_error_before_the_first_change_refuses_nothing(tmp_path):
    model, opt = made("adamw", None)
    step(model, opt, 0)
    before = [p.detach().clone() for p in model.parameters()]
    first = next(model.parameters())
    first.grad = torch.randn_like(first).to_sparse()
    with pytest.raises(Exception, match="sparse"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    step(model, opt, 1)


def test_the_first_record_of_a_directory_torn_in_the_middle_is_no_state(tmp_path):
    """A process that is killed while it writes that record has no state yet, and the next begins."""
    model, opt = made("adamw@disk kept", tmp_path / "state")
    opt.close()
    (record,) = (tmp_path / "state").glob("record-*")
    data = bytearray(record.read_bytes())
    half = len(data) // 2
    data[half + 60 :] = bytes(len(data) - half - 60)
    record.write_bytes(data)
    model, opt = made("adamw@disk kept", tmp_path / "state")
    step(model, opt, 0)
    opt.close()


def test_what_a_commit_gives_back_is_given_back_once():
    arena = Arena(None, "disk")
    entry = Entry.allocate(arena, [Line("", "exp_avg", "", "float32", (2048,), 8192, "disk")], 2)
    entry.release(arena)
    entry.release(arena)
    first, second = (Entry.allocate(arena, [Line("", "m", "", "float32", (4096,), 16384, "disk")], 1) for _ in range(2))
    assert first.begins[0] + 16384 <= second.begins[0] or second.begins[0] + 16384 <= first.begins[0]
