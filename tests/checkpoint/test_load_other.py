"""``load_state_dict`` of what another spec or another tool saved: a run goes on after its string was changed."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError

SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "adamw-bf16", "adafactor")


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 80))


def drive(net, opt, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.item()


def made(net, what, **keywords):
    if what == "torch":
        return torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    return memopt.create(net, what, lr=2e-3, weight_decay=0.02, **keywords)


def through_a_file(state_dict):
    """As frameworks keep it: pickled by torch.save, read with the safe unpickler."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("after", SPECS)
@pytest.mark.parametrize("before", ["torch", *SPECS])
def test_a_run_goes_on_under_another_spec(before, after):
    net = model()
    theirs = made(net, before)
    drive(net, theirs, 5)
    resumed = copy.deepcopy(net)
    opt = made(resumed, after)
    saved = through_a_file(theirs.state_dict())
    if before == "adafactor" and after != "adafactor":
        with pytest.raises(SpecError, match="needs 'exp_avg' and adafactor does not keep it"):
            opt.load_state_dict(saved)
        assert not opt.state
        return
    if (before, after) == (
        "torch",
        "adafactor",
    ) and "decoupled_weight_decay" not in theirs.defaults:  # torch before 2.7
        with pytest.raises(ValueError, match=r"which of adam, adamw it was; say it with rule= of memopt\.load"):
            opt.load_state_dict(saved)
        return
    same = before == after or (before, after) == ("torch", "adamw")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    assert [str(w.message) for w in said if "converted" in str(w.message)] == [] if same else len(said) == 1
    assert opt.param_groups[0]["lr"] == 2e-3
    assert all(float(opt.state[p]["step"]) == 5 for p in resumed.parameters())
    if before != "torch":  # the same bits as the conversion of the running optimizer
        net2 = copy.deepcopy(net)
        other = made(net2, before)
        other.load_state_dict(theirs.state_dict())
        if not same:
            other.convert_(after)
        for p, q in zip(resumed.parameters(), net2.parameters(), strict=True):
            assert opt.state[p].keys() == other.state[q].keys()
            for key in opt.state[p]:
                assert torch.equal(opt.state[p][key], other.state[q][key]), key
    before_loss = drive(copy.deepcopy(net), theirs, 0 + 1, 5)
    assert drive(resumed, opt, 1, 5) == pytest.approx(before_loss, rel=1e-5)


def test_the_warning_says_what_was_lost_of_each_moment():
    net = model()
    theirs = made(net, "torch")
    drive(net, theirs, 3)
    opt = made(net, "adamw-8bit")
    with pytest.warns(UserWarning, match=r"adamw of torch\.optim.* adamw-8bit.*exp_avg 0\.0.*exp_avg_sq 0\.0"):
        opt.load_state_dict(theirs.state_dict())


def test_who_wants_it_strict_is_told():
    net = model()
    theirs = made(net, "adamw")
    drive(net, theirs, 2)
    opt = made(net, "adamw-8bit", on_mismatch="refuse")
    with pytest.raises(ValueError, match="saved by 'adamw', this is 'adamw-8bit'"):
        opt.load_state_dict(theirs.state_dict())
    assert not opt.state
    with pytest.raises(SpecError, match="on_mismatch='maybe' is not allowed; it must be one of convert, refuse"):
        made(net, "adamw", on_mismatch="maybe")


def test_overrides_masters_keys_of_the_users_own_and_schedulers_travel():
    net = model().bfloat16()
    theirs = made(net, "adamw-8bit+fp32", overrides={"2.*": "32bit"})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 10)
    for step in range(3):
        net(torch.ones(4, 96, dtype=torch.bfloat16) * step).square().mean().backward()
        theirs.step()
        schedule.step()
    first = next(net.parameters())
    theirs.state[first]["note"] = torch.arange(3)
    opt = made(net, "adamw-4bit+split")
    with pytest.warns(UserWarning, match="converted"):
        opt.load_state_dict(through_a_file(theirs.state_dict()))
    assert opt.state[first]["note"].tolist() == [0, 1, 2]
    assert opt.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 2e-3
    assert opt.param_groups[0]["initial_lr"] == 2e-3
    torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10, last_epoch=2)


def test_other_parameters_are_refused_before_anything_changes():
    net = model()
    theirs = made(net, "adamw")
    drive(net, theirs, 1)
    small = nn.Linear(96, 64)
    opt = made(small, "adamw-8bit")
    with pytest.raises(ValueError, match=r"4 parameters|no parameter"):
        opt.load_state_dict(theirs.state_dict())
    assert not opt.state
    damaged = theirs.state_dict()
    damaged["state"][0]["exp_avg"] = damaged["state"][0]["exp_avg"][:5]
    with pytest.raises(ValueError, match=r"0\.weight: exp_avg is torch\.float32 \[5, 96\]"):
        made(net, "adamw-8bit").load_state_dict(damaged)


@pytest.mark.parametrize("key", [None, "optimizer", "optimizer_states"])
def test_the_command_line_reads_the_file_that_a_framework_wrote(tmp_path, run, key):
    net = model()
    theirs = made(net, "adamw-8bit")
    drive(net, theirs, 2)
    saved = theirs.state_dict()
    path = tmp_path / "optimizer.pt"
    torch.save(saved if key is None else {key: [saved] if key.endswith("s") else saved, "epoch": 1}, path)
    code, out, _ = run("inspect", str(path))
    assert code == 0
    assert "adamw-8bit, step 2, 4 parameters" in out
    code, out, err = run("convert", str(path), str(tmp_path / "out"), "--to", "adamw-4bit")
    assert code == 0, err
    opt = made(net, "adamw-4bit")
    memopt.load(tmp_path / "out", optimizer=opt)
    assert opt.state[next(net.parameters())]["step"] == 2


@pytest.mark.parametrize("place", ["", "@paged", "@host", "@cpu"])
def test_the_optimizers_own_tensors_are_read_before_they_are_written_over(place):
    net = model()
    opt = made(net, f"adamw{place}")
    drive(net, opt, 3)
    saved = opt.state_dict()
    wanted = {p: state["exp_avg"].clone() for p, state in opt.state.items()}
    opt.convert_(f"adam{place}")
    with pytest.warns(UserWarning, match="was converted to"):
        opt.load_state_dict(saved)
    assert all(torch.equal(opt.state[p]["exp_avg"], x) for p, x in wanted.items())
    memopt.load(opt.state_dict(), optimizer=opt)
    assert all(torch.equal(opt.state[p]["exp_avg"], x) for p, x in wanted.items())


def as_it_is(opt):
    return [{key: x.clone() for key, x in opt.state[p].items()} for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("spec", ["adamw-8bit", "adamw-8bit@disk", "came"])
def test_the_states_own_tensors_are_loaded_without_a_copy_and_under_another_number_too(spec):
    """What loads into the tensors of ``state_dict()`` (torch.distributed.checkpoint) needs no second state."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    opt = memopt.create(list(net.parameters()), spec)
    for p in net.parameters():
        p.grad = torch.randn(p.shape)
    opt.step()
    saved, before = opt.state_dict(), as_it_is(opt)
    there = [x.data_ptr() for state in saved["state"].values() for x in state.values()]
    opt.load_state_dict(saved)
    assert as_it_is(opt) == [{key: Bits(x) for key, x in state.items()} for state in before]
    assert [x.data_ptr() for state in opt.state_dict()["state"].values() for x in state.values()] == there
    half = len(before) // 2
    swapped = {i: saved["state"][(i + half) % len(before)] for i in range(len(before))}
    opt.load_state_dict({**saved, "state": swapped})
    assert as_it_is(opt) == [{k: Bits(x) for k, x in s.items()} for s in (*before[half:], *before[:half])]


class Bits:
    """A tensor that is equal to one of the same bits."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x.dtype == other.dtype and torch.equal(self.x, other)

    __hash__ = None


def test_a_dictionary_that_lost_what_memopt_wrote_beside_the_state_is_read_as_the_optimizers_own():
    net = model()
    theirs = made(net, "adamw-8bit")
    drive(net, theirs, 2)
    bare = {key: copy.deepcopy(theirs.state_dict()[key]) for key in ("state", "param_groups")}
    opt = made(copy.deepcopy(net), "adamw-8bit", on_mismatch="refuse")
    opt.load_state_dict(bare)
    assert as_it_is(opt) == [{key: Bits(x) for key, x in state.items()} for state in as_it_is(theirs)]


def test_a_rate_that_is_a_tensor_stays_that_tensor_and_none_of_the_dictionarys_is_taken():
    net = model()
    theirs = memopt.create(net, "adamw", lr=torch.tensor(3e-3))
    opt = memopt.create(net, "adamw", lr=torch.tensor(1.0))
    rate, saved = opt.param_groups[0]["lr"], theirs.state_dict()
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(3e-3)
    plain = memopt.create(net, "adamw")
    plain.load_state_dict(saved)
    plain.param_groups[0]["lr"].fill_(0.5)
    assert float(theirs.param_groups[0]["lr"]) == pytest.approx(3e-3)


def test_one_ranks_rows_do_not_go_into_another_partition():
    net = model()
    theirs = made(net, "adamw")
    drive(net, theirs, 1)
    saved = theirs.state_dict()
    saved["memopt"].update(spec="adamw/zero1", rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank 0 of 2"):
        made(net, "adamw").load_state_dict(saved)


def test_what_torch_cannot_read_beside_an_optimizer_is_a_sentence(tmp_path, monkeypatch):
    """A rebuilt tensor that lacks an argument (found by the fuzzer) is a TypeError of torch's unpickler."""
    from memopt.checkpoint.state.detect import surroundings

    p = torch.nn.Parameter(torch.ones(3))
    path = tmp_path / "x.pt"
    torch.save({"optimizer": torch.optim.AdamW([p]).state_dict(), "epoch": 1}, path)
    assert surroundings(path) is not None

    def failing(*args, **keywords):
        raise TypeError("_rebuild_tensor_v2() missing 1 required positional argument")

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(ValueError, match="cannot be written again, for torch"):
        surroundings(path)


def test_a_vector_in_the_place_of_several_parameters_loads_with_their_names():
    """As DeepSpeed's checkpoints have it: one vector in a group, and the names of what it was made of."""
    vectors = [nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(2)]
    saved, loaded = (memopt.create([p], "adamw-8bit", lr=1e-2) for p in vectors)
    vectors[0].grad = torch.ones(5000)
    saved.step()
    state_dict = saved.state_dict()
    state_dict["param_groups"][0]["param_names"] = [f"layers.{i}.weight" for i in range(6)]
    loaded.load_state_dict(through_a_file(state_dict))
    for key, x in saved.state[vectors[0]].items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(loaded.state[vectors[1]][key])), key
