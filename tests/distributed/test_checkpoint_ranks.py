"""Checkpoints of several processes: each writes its rows, any number of processes reads them, bit for bit."""

import pytest
import torch

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits, odd_model
from tests.helpers.saved_ranks import FORMATS, REGROUPED, SPECS, everything, load_each
from tests.helpers.sharded import drive


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """``(folder, what each of two ranks returned)``"""
    path = str(tmp_path_factory.mktemp("ranks"))
    return path, ranks.run(everything, 2, path)


def assert_rows_are(wholes, parts):
    """The ranks' rows put together are the whole state, bit for bit; column means are on every rank."""
    for i, whole in enumerate(wholes):
        for key, value in whole.items():
            cut = [part[i][key] for part in parts]
            if key == "step" or (key.endswith(".col") and value.dim() == 2):
                for one in cut:
                    assert_same_bits(one, value, key)
            else:
                assert_same_bits(torch.cat([one.reshape(-1) for one in cut]), value.reshape(-1), key)


def test_two_ranks_write_what_one_and_three_read(session):
    path, _ = session
    single, models = {}, {}
    for spec in SPECS:
        model = odd_model()
        opt = memopt.create(model, spec)
        loaded = memopt.load(f"{path}/{spec}", model=model, optimizer=opt, rng=False)
        assert not any(loss.encoded for loss in loaded.conversion.losses.values())
        single[spec] = [{k: t.clone() for k, t in opt.state[p].items()} for p in model.parameters()]
        drive(model, opt, 2, 1)
        models[spec] = [p.detach().clone() for p in model.parameters()]
    three = ranks.run(load_each, 3, path)
    for spec in SPECS:
        assert_rows_are(single[spec], [rank[0][spec][0] for rank in three])
        for rank, _ in three:
            for mine, theirs in zip(models[spec], rank[spec][1], strict=True):
                if spec == "adafactor":  # sums over ranks are taken in another order
                    torch.testing.assert_close(mine, theirs)
                else:
                    assert_same_bits(mine, theirs, spec)


def test_the_same_ranks_get_their_own_rows_and_random_numbers_back(session):
    _, both = session
    drawn = [rank["drawn"] for rank in both]
    assert [rank["loaded"][1] for rank in both] == drawn
    assert drawn[0] != drawn[1]


def test_sharded_state_loads_into_another_format_in_one_process(session):
    path, _ = session
    a, b = odd_model(), odd_model()
    first, second = memopt.create(a, "adamw-8bit"), memopt.create(b, "adamw-4bit")
    memopt.load(f"{path}/adamw-8bit", optimizer=first, rng=False)
    report = memopt.load(f"{path}/adamw-8bit", optimizer=second, rng=False).conversion
    assert report.relative_error == first.convert_("adamw-4bit").relative_error
    for x, y in zip(first.state.values(), second.state.values(), strict=True):
        for key, value in x.items():
            assert_same_bits(value, y[key], key)


def test_one_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(session):
    for message, files, extra in (rank["failed"] for rank in session[1]):
        assert "could not be written (No space left on device)" in message
        assert files == ["00000001-step0"]
        assert extra == {"n": 1}


def test_convert_works_on_the_shard(session):
    (first, a), (second, b) = (rank["converted"] for rank in session[1])
    assert first == second  # errors are of the whole state
    model = odd_model()
    for fmt in FORMATS:
        opt = memopt.create(model, f"adamw-{fmt}".replace("-32bit", ""))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        opt.step()
        for after in FORMATS:
            report = opt.convert_(f"adamw-{after}".replace("-32bit", ""))
            assert report.relative_error == pytest.approx(first[fmt, after], rel=1e-3, abs=1e-7)
    for p, x, y in zip(model.parameters(), a, b, strict=True):
        for key, whole in opt.state[p].items():
            if key == "exp_avg_sq.row":
                torch.testing.assert_close(torch.cat([x[key], y[key]]), whole)
            elif key == "exp_avg_sq.col" and p.dim() == 2:
                torch.testing.assert_close(x[key], whole)


@pytest.mark.parametrize("spec", REGROUPED)
def test_the_partition_changes_in_place(session, spec):
    (whole, mine), (other, theirs) = (rank["regrouped"][spec] for rank in session[1])
    model = odd_model(torch.bfloat16 if "+" in spec else torch.float32)
    opt = memopt.create(model, spec)
    drive(model, opt, 0, 2)
    for p, first, second in zip(model.parameters(), whole, other, strict=True):
        for key, value in opt.state[p].items():
            assert_same_bits(value, first[key], key)
            assert_same_bits(value, second[key], key)
    assert_rows_are(whole, [mine, theirs])


def test_sharding_in_place_is_refused_with_a_sentence(session):
    for rank in session[1]:
        said, spec = rank["sharded"]
        assert len(said) == 2
        assert all("how parameters are sharded is decided before training; save and load" in words for words in said)
        assert spec == "adamw-8bit/zero1"


def test_one_rank_that_cannot_change_the_rule_stops_all_and_all_go_on(session):
    (a, *states), (b, *others) = (rank["stopped between rules"] for rank in session[1])
    assert "rank 1: no memory. 2 of" in a
    assert "no memory. 2 of" in b
    for done, straight in (states, others):
        for x, y in zip(done, straight, strict=True):
            assert x.keys() == y.keys()
            for key, value in x.items():
                assert_same_bits(value, y[key], key)


def test_one_rank_that_cannot_convert_stops_all_at_the_same_parameter(session):
    (a, overrides), (b, others) = (rank["stopped"] for rank in session[1])
    first, second, *_ = (name for name, _ in odd_model().named_parameters())
    assert overrides == others == {first: "8bit@device", second: "8bit@device"}
    assert "rank 1: no memory. 2 of" in a
    assert "no memory. 2 of" in b
