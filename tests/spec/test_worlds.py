"""Worlds that are not there: a thousand ranks priced at once, and a plan checked in a fake process group."""

import copy
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import memopt
from estimators.models.resolve import resolve
from memopt.pricing.price import named_tensors
from tests.helpers.sharded import uneven_model

SPECS = [
    "adamw/zero1",
    "adamw-8bit/zero1",
    "adamw-8bit/zero3",
    "adafactor/zero2",
    "adammini-4bit/zero3",
    "adamw+fp32/zero1",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_balance_is_the_price_of_every_rank(spec):
    model = uneven_model()
    for world in (1, 3, 7):
        found = memopt.balance(model, spec, world_size=world)
        assert list(found.nbytes) == [memopt.price(model, spec, world_size=world, rank=r).nbytes for r in range(world)]


def test_overrides_count():
    keywords = {"overrides": {"odd": "32bit", "few": "4bit"}}
    found = memopt.balance(uneven_model(), "adamw-8bit/zero1", world_size=2, **keywords)
    assert found.nbytes[1] == memopt.price(uneven_model(), "adamw-8bit/zero1", world_size=2, rank=1, **keywords).nbytes


@pytest.mark.parametrize("spec", ["adamw/zero1", "adamw-8bit/zero3"])
def test_a_thousand_ranks_of_the_largest_model_take_under_a_second(spec):
    shapes = resolve("llama-3.1-405b").shapes
    started = time.perf_counter()
    found = memopt.balance(shapes, spec, world_size=1024)
    assert time.perf_counter() - started < 1
    assert found.max_over_mean < 1.001
    assert found.nbytes[0] == memopt.price(shapes, spec, world_size=1024).nbytes


@pytest.mark.parametrize("spec", ["adamw/zero1", "adamw-8bit/zero1", "adamw/zero3", "adamw-8bit/zero3"])
def test_sixteen_ranks_of_a_small_llama_are_even(spec):
    found = memopt.balance(resolve("llama-3.2-1b").shapes, spec, world_size=16)
    assert found.max_over_mean <= 1.05


@pytest.mark.parametrize("spec", SPECS)
def test_a_rank_holds_a_share_and_at_most_one_row_more(spec):
    tensors = named_tensors(uneven_model())
    whole = memopt.price(tensors, spec).nbytes
    for world in (2, 3, 4):
        one_row = sum(
            memopt.price([(n, t)], "adamw+fp32").nbytes // max(t.shape[0], 1) if len(t.shape) > 1 else 8 * 256
            for n, t in tensors
        )
        columns = memopt.price(tensors, spec, world_size=10**6, rank=10**6 - 1).nbytes  # what every rank holds
        most = max(memopt.balance(tensors, spec, world_size=world).nbytes)
        assert most <= whole / world + one_row + columns


@pytest.fixture
def fake_world(monkeypatch):
    """A process group of many ranks in which nothing is sent."""
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(rank, world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 9, 15])
def test_the_plan_of_zero1_in_a_fake_world(fake_world, monkeypatch, rank):
    fake_world(rank, 16)
    model = nn.Sequential(uneven_model(), nn.Linear(300, 301))
    opt = memopt.create(model, "adamw-8bit/zero1")
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    received, gather = [], getattr(dist, name)

    def counted(out, *rest, **keywords):
        received.append(out.numel() * out.element_size())
        return gather(out, *rest, **keywords)

    monkeypatch.setattr(dist, name, counted)
    monkeypatch.setattr("memopt.partitions.zero1.BUCKET_NBYTES", 100_000)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    planned = memopt.balance(model, "adamw-8bit/zero1", world_size=16)
    assert opt.ledger().nbytes == planned.nbytes[rank]
    assert sum(received) == planned.gathered
    assert len(received) == planned.buckets > 3


def test_the_plan_of_zero3_in_a_fake_world(fake_world):
    """One rank only: DeviceMesh remembers the first that it sees in a process."""
    rank = 15
    fake_world(rank, 16)
    model = memopt.shard(uneven_model(), "adamw-8bit/zero3")
    opt = memopt.create(model, "adamw-8bit/zero3")
    opt.init_state()
    assert opt.ledger().nbytes == memopt.balance(uneven_model(), "adamw-8bit/zero3", world_size=16).nbytes[rank]


def test_a_ranks_state_loads_where_a_rank_has_the_same_rows(fake_world):
    """Of even shapes a rank has rows of the same number everywhere: the partition has to say that they are others."""
    fake_world(0, 2)

    def stepped(partition):
        model = nn.Linear(8, 8, bias=False)
        if partition in ("zero2", "zero3"):
            memopt.shard(model, f"adamw/{partition}")
        opt = memopt.create(model, f"adamw/{partition}")
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
        return opt

    partitions = ("zero1", "zero2", "zero3")
    for saved, loaded in itertools.product(partitions, partitions):
        state, opt = copy.deepcopy(stepped(saved).state_dict()), stepped(loaded)
        if (saved == "zero1") == (loaded == "zero1"):
            opt.load_state_dict(state)
            assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 1
            continue
        before = copy.deepcopy(opt.state_dict()["state"])
        words = f"one rank's of 'adamw/{saved}', and it is loaded into 'adamw/{loaded}', of which a rank has other rows"
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(state)
        assert str(opt.state_dict()["state"]) == str(before)
