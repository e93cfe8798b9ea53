"""ZeRO-2 and ZeRO-3 over real processes: parameters and state are those of one process, bytes are the ledger's."""

import pytest
import torch

import memopt
from memopt.kernels import loader
from memopt.rules import RULES
from tests.helpers import sharded
from tests.helpers.cases import assert_same_bits
from tests.helpers.sharded_runs import SPECS, STEPS, WORLD, of_specs, session

#: What kernels round otherwise than torch, relative to the largest element.
RTOL = 1e-6


def alone(spec, partition="none"):
    model, opt = sharded.reference(spec, partition)
    sharded.drive(model, opt, 0, STEPS)
    return {name: (p.detach(), opt.state[p]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_state_are_those_of_one_process(spec, monkeypatch):
    """Every bit. Where there are sums, ranks take them in fp64, so that their number does not show: one process does
    too where the spec has a partition. Without one its sums are quicker, and equal to 1e-6."""
    expected = alone(spec)
    rule = RULES[memopt.parse(spec).rule]

    def sums(p):  # adammini: the means of a vector that is cut between any two elements
        factored, means = "factored" in spec and p.dim() > 1, rule.name == "adammini" and p.dim() < 2
        return not rule.element_wise or factored or means

    if any(sums(p) for p, _ in expected.values()):
        for whole, (p, _) in zip(session(of_specs)[0]["specs"][spec]["model"], expected.values(), strict=True):
            assert (whole - p).abs().max() <= RTOL * p.abs().max()
        if rule.name == "adammini":  # its means of cut vectors are torch's
            monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
        expected.update({name: found for name, found in alone(spec, "zero1").items() if sums(found[0])})
    for i, (name, (p, state)) in enumerate(expected.items()):
        for rank in session(of_specs):
            assert_same_bits(rank["specs"][spec]["model"][i], p, name)
        for key, value in state.items():
            parts = [rank["specs"][spec]["state"][i][key] for rank in session(of_specs)]
            if all(part.shape == value.shape for part in parts):  # the step, and means that every rank has
                assert all(torch.equal(part, value) for part in parts)
            else:
                assert_same_bits(torch.cat([q.reshape(-1) for q in parts]), value.reshape(-1), f"{name} {key}")


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_of_each_rank_are_the_ledgers(spec):
    for r, rank in enumerate(session(of_specs)):
        assert rank["specs"][spec]["same_ledger"], r
        assert rank["specs"][spec]["same_price"], r
        assert rank["specs"][spec]["same_bytes"], r
        assert f"rank {r} of {WORLD}" in rank["specs"][spec]["explain"]


def test_a_nan_on_one_rank_skips_the_step_on_all():
    for r, rank in enumerate(session(of_specs)):
        skipped, same, messages = rank["nan"]
        assert skipped == 1
        assert same
        assert ("odd" if r == WORLD - 1 else "a parameter on another rank") in messages[0]


def test_statistics_of_many_parameters_share_their_collectives():
    """60 parameters: RMS of the parameter, column sums, RMS of the update, and whether a gradient is bad."""
    assert all(rank["collectives"] <= 4 for rank in session(of_specs))


def test_one_process_without_a_group_is_the_same_path():
    model, opt = sharded.build("adamw-8bit/zero3")
    sharded.drive(model, opt, 0, 2)
    other, single = sharded.reference("adamw-8bit/zero3")
    sharded.drive(other, single, 0, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(a, b)
    assert opt.ledger() == memopt.price(model, "adamw-8bit/zero3")


def test_means_of_a_vector_that_may_be_cut_are_not_for_kernels(monkeypatch):
    """Their rows are of one element: kernels would keep a mean of each."""
    model, opt = sharded.build("adammini/zero3")
    sharded.drive(model, opt, 0, 2)
    assert "means of 256 elements of a vector that may be cut between any two" in opt.explain()
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    other, plain = sharded.build("adammini/zero3")
    sharded.drive(other, plain, 0, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= RTOL * b.abs().max()
    assert opt.ledger() == memopt.price(other, "adammini/zero3")
