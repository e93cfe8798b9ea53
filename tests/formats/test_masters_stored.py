"""Masters in conversions and checkpoints: another master, format, tool or number of ranks."""

import pytest
import torch

import memopt
from memopt.masters import MASTERS
from memopt.partitions.base import owned
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits, odd_model
from tests.helpers.mastered import BITS, drive


def exact_values(opt):
    master = MASTERS[opt.spec.master]
    return [master.read(p.detach(), opt.state[p].get(master.key)) for _, p, _ in opt.params.entries()]


def stepped(spec, steps=3):
    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, spec, lr=1e-4)
    drive(model, opt, 0, steps)
    return model, opt


@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_another_master_keeps_the_value_as_precisely_as_it_can(before, after):
    model, opt = stepped(f"adamw-8bit+{before}")
    exact, weights = exact_values(opt), [p.detach().clone() for p in model.parameters()]
    report = opt.convert_(f"adamw-8bit+{after}")
    assert opt.ledger() == memopt.price(model, f"adamw-8bit+{after}")
    worst = 2.0 ** -min(BITS[after][0], 17)
    for p, w, x, y in zip(model.parameters(), weights, exact, exact_values(opt), strict=True):
        assert_same_bits(p, w)
        # Stochastically rounded weights may be a whole unit off their value, and stay so.
        assert ((x - y).abs() <= x.abs() * worst).all() or not MASTERS[after].key
    if MASTERS[after].key and MASTERS[before].key:
        loss = report.losses[MASTERS[after].key]
        assert (loss.copied > 0) == (before == after)
        assert loss.relative_error <= worst
    elif MASTERS[before].key:
        assert MASTERS[before].key in report.dropped
    drive(model, opt, 3, 1)


def test_a_chain_of_masters_keeps_what_all_of_them_hold():
    _, opt = stepped("adamw+kahan", 5)
    exact = exact_values(opt)
    for spec in ("adamw-8bit+fp32", "adamw-8bit+split16", "adamw+fp32@paged"):
        opt.convert_(spec)
        for x, y in zip(exact, exact_values(opt), strict=True):
            assert ((x - y).abs() <= x.abs() * 2.0**-23).all()


@pytest.mark.parametrize("after", ["adamw-8bit+kahan", "adamw-8bit+split", "adamw-8bit+fp32", "adamw-8bit"])
def test_a_checkpoint_loads_into_another_master(tmp_path, after):
    model, opt = stepped("adamw-8bit+kahan")
    exact = exact_values(opt)
    memopt.save(tmp_path / "run", model=model, optimizer=opt)
    other = odd_model(torch.bfloat16)
    twin = memopt.create(other, after, lr=1e-4)
    memopt.load(tmp_path / "run", model=other, optimizer=twin)
    for x, y in zip(exact, exact_values(twin), strict=True):
        assert ((x - y).abs() <= x.abs() * 2.0 ** -min(BITS[twin.spec.master][0], 23)).all()
    assert twin.ledger() == memopt.price(other, after)
    if after == str(opt.spec):
        drive(model, opt, 3, 2)
        drive(other, twin, 3, 2)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_same_bits(p, q)


def save_sharded(folder):
    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, "adamw-8bit+kahan/zero1", lr=1e-4)
    drive(model, opt, 0, 3)
    memopt.save(folder, model=model, optimizer=opt)


def load_sharded(folder):
    """Into another master on each rank, and a step more; the value of the rows that are here, and all parameters."""
    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, "adamw-8bit+split16/zero1", lr=1e-4)
    memopt.load(folder, model=model, optimizer=opt)
    master = MASTERS["split16"]
    values = [
        master.read(owned(p.detach(), opt.partition.local_rows(p)), opt.state[p]["correction"])
        for _, p, _ in opt.params.entries()
    ]
    drive(model, opt, 3, 1)
    return values, [p.detach() for p in model.parameters()]


@pytest.mark.slow
def test_masters_of_two_ranks_become_others_on_one_and_on_three(tmp_path):
    _, opt = stepped("adamw-8bit+kahan")
    exact = exact_values(opt)
    ranks.run(save_sharded, 2, str(tmp_path / "run"))
    one = odd_model(torch.bfloat16)
    alone = memopt.create(one, "adamw-8bit+split16", lr=1e-4)
    memopt.load(tmp_path / "run", model=one, optimizer=alone)
    found = ranks.run(load_sharded, 3, str(tmp_path / "run"))
    for i, (x, y) in enumerate(zip(exact, exact_values(alone), strict=True)):
        assert ((x - y).abs() <= x.abs() * 2.0**-23).all()
        cut = torch.cat([values[i].reshape(-1) for values, _ in found])
        assert_same_bits(cut, y.reshape(-1))
    drive(one, alone, 3, 1)
    for _, parameters in found:
        for p, q in zip(one.parameters(), parameters, strict=True):
            assert_same_bits(p, q)


def test_a_checkpoint_is_converted_without_a_model(tmp_path, capsys):
    from memopt.cli import main

    model, opt = stepped("adamw-8bit+kahan")
    memopt.save(tmp_path / "run", model=model, optimizer=opt)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "adamw-8bit+split16"]) == 0
    other = odd_model(torch.bfloat16)
    twin = memopt.create(other, "adamw-8bit+split16", lr=1e-4)
    memopt.load(tmp_path / "out", model=other, optimizer=twin)
    for x, y in zip(exact_values(opt), exact_values(twin), strict=True):
        assert ((x - y).abs() <= x.abs() * 2.0**-23).all()
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "compensation (raw)" in capsys.readouterr().out
    # The state alone: what kahan keeps means nothing to split without the weights.
    memopt.save(tmp_path / "alone", optimizer=opt)
    assert main(["convert", str(tmp_path / "alone"), str(tmp_path / "out2"), "--to", "adamw-8bit+split"]) == 2
    assert "means something beside its weights only" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "alone"), str(tmp_path / "out2"), "--to", "adamw+kahan"]) == 0


def test_state_without_a_master_loads_into_one_and_not_the_other_way():
    model = odd_model(torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-4)
    drive(model, theirs, 0, 2)
    state = theirs.state_dict()
    for entry in state["state"].values():
        entry.update({k: v.float() for k, v in entry.items()})
    twin = odd_model(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    ours = memopt.create(twin, "adamw+kahan")
    ours.load_state_dict(state)
    for x, p in zip(exact_values(ours), model.parameters(), strict=True):
        assert_same_bits(x, p.detach().float())
    plain = memopt.create(odd_model(torch.bfloat16), "adamw", on_mismatch="refuse")
    with pytest.raises(ValueError, match=r"saved by 'adamw\+kahan', this is 'adamw'"):
        plain.load_state_dict(ours.state_dict())
