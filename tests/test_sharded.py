"""ZeRO-2 and ZeRO-3 over real processes: parameters and state are those of one process, bytes are the ledger's."""

import warnings

import pytest
import ranks
import sharded
import torch
import torch.distributed as dist
from cases import HYPER, assert_same_bits, live_nbytes
from torch import nn

import memopt
from memopt.kernels import loader
from memopt.rules import RULES

WORLD = 4
STEPS = 20
#: A sample; benchmarks/sharding_matrix.py runs every rule × format × partition on 1 to 4 ranks.
SPECS = ["adamw/zero2", "adamw/zero3", "adamw-8bit/zero3", "lion-4bit/zero2", "rmsprop-fp8/zero3", "sgd-bf16/zero3",
         "adafactor/zero2", "adafactor-32bit/zero3", "came/zero3", "adamw-factored/zero3", "adamw-8bit@paged/zero3",
         "adafactor/zero1", "adammini-8bit/zero3", "adamw-8bit+stochastic/zero3", "lamb/zero3"]  # fmt: skip
#: What kernels round otherwise than torch, relative to the largest element.
RTOL = 1e-6


def run_spec(spec):
    model, opt = sharded.build(spec)
    sharded.drive(model, opt, 0, STEPS)
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    predicted = memopt.price(sharded.uneven_model(), spec, world_size=WORLD, rank=dist.get_rank(), **hyper)
    return {
        "model": [sharded.whole(p) for p in model.parameters()],
        "state": [dict(opt.state[p]) for p in model.parameters()],
        "same_ledger": predicted == opt.ledger(),
        "same_price": spec.endswith("1") or predicted == memopt.price(model, spec, **hyper),
        "same_bytes": live_nbytes(opt) == predicted.nbytes,
        "explain": opt.explain(),
    }


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(67, 67) for _ in range(2))
        self.head = nn.Linear(67, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def train_blocks(spec, world, mesh=None):
    """Losses and parameters of a real training step, clipped; each rank has its own part of the batch."""
    torch.manual_seed(1)
    model = Blocks()
    if "/" in spec:
        memopt.shard(model, spec, mesh=mesh)
    opt = memopt.create(model, spec, lr=1e-2)
    rank = dist.get_rank() if world > 1 else 0
    for step in range(5):
        data = torch.randn(8, 67, generator=torch.Generator().manual_seed(step))
        model(data.chunk(world)[rank]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
    return [sharded.whole(p) for p in model.parameters()]


def two_dimensions():
    """HSDP, and FSDP over tensor parallelism: parameters after a few steps, and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {"hsdp": train_blocks("adamw-8bit/zero3", WORLD, mesh)}
    placements = {"rows": (Shard(0), Replicate()), "columns": (Shard(0), Shard(1)), "replicas": (Replicate(), Shard(0)),
                  "twice": (Shard(0), Shard(0))}  # fmt: skip
    for name, spec in [("rows", "adamw-8bit/zero3"), ("replicas", "adafactor/zero3"), ("columns", "adamw/zero3"),
                       ("twice", "adafactor/zero3")]:  # fmt: skip
        torch.manual_seed(0)
        p = nn.Parameter(distribute_tensor(torch.randn(255, 70), mesh, placements[name]))
        opt = memopt.create([("w", p)], spec)
        for step in range(3):
            p.grad = sharded.as_sharded(torch.randn(255, 70, generator=torch.Generator().manual_seed(step)), p)
            opt.step()
        found[name] = sharded.whole(p), opt.ledger() == memopt.price([("w", p)], spec)
    for spec in ("adamw-8bit/zero3", "adafactor/zero3", "adafactor-32bit/zero3"):
        p = nn.Parameter(distribute_tensor(torch.randn(255, 70), mesh, placements["columns"]))
        p.grad = p.detach().clone()
        opt = memopt.create([("w", p)], spec)
        with pytest.raises(RuntimeError, match="w is cut along another dimension") as refused:
            opt.step()
        assert not opt.state[p]
        found[spec] = str(refused.value)
    return found


def over_tensor_parallelism():
    """fully_shard over parallelize_module: the rows memopt steps are those that are here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 64, bias=False), nn.Linear(70, 66, bias=False))
    wholes = [p.detach().clone() for p in model.parameters()]
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
    memopt.shard(model, "adamw-8bit/zero3", mesh=mesh["dp"])
    opt = memopt.create(model, "adamw-8bit/zero3")
    even, uneven = model.parameters()
    rows = opt.partition.held(even)
    assert_same_bits(even.to_local(), wholes[0][rows.first : rows.stop])
    even.grad = even.detach().clone()
    uneven.grad = uneven.detach().clone()
    with pytest.raises(RuntimeError, match=r"1\.weight has 66 rows, which 4 ranks of data") as error:
        opt.step()
    return str(error.value)


def refusals():
    messages = {}
    model, opt = sharded.uneven_model(), None
    opt = memopt.create(model, "adamw/zero3")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for name, spec in [("whole", "adamw/zero3"), ("plain", "adamw-8bit"), ("zero1", "adamw-8bit/zero1")]:
        model = sharded.uneven_model()
        if name != "whole":
            memopt.shard(model, "adamw/zero3")
        opt = memopt.create(model, spec)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError) as error:
            opt.step()
        messages[name] = str(error.value), len(opt.state)
    return messages


def nan_on_one_rank():
    model, opt = sharded.build("adamw-8bit/zero3")
    sharded.drive(model, opt, 0, 1)
    before = [p.to_local().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = sharded.as_sharded(torch.ones(p.shape), p)
    if dist.get_rank() == WORLD - 1:
        model.odd.grad.to_local()[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    return opt.skipped_steps, same, [str(w.message) for w in caught if "NaN" in str(w.message)]


def collectives():
    """How many collectives a step of a whole-tensor rule takes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(30)))
    memopt.shard(model, "adafactor/zero3")
    opt = memopt.create(model, "adafactor/zero3")
    for p in model.parameters():
        p.grad = sharded.as_sharded(torch.ones(p.shape), p)
    opt.step()
    count, whole = [0], dist.all_reduce

    def counted(*args, **kwargs):
        count[0] += 1
        return whole(*args, **kwargs)

    dist.all_reduce = counted
    opt.step()
    dist.all_reduce = whole
    return count[0]


def everything():
    return {
        "specs": {spec: run_spec(spec) for spec in SPECS},
        "blocks": {spec: train_blocks(spec, WORLD) for spec in ("adamw-8bit/zero2", "adamw-8bit/zero3")},
        "two": two_dimensions(),
        "tp": over_tensor_parallelism(),
        "refusals": refusals(),
        "nan": nan_on_one_rank(),
        "collectives": collectives(),
    }


@pytest.fixture(scope="module")
def session():
    return ranks.run(everything, WORLD)


def alone(spec):
    model, opt = sharded.reference(spec)
    sharded.drive(model, opt, 0, STEPS)
    return {name: (p.detach(), opt.state[p]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_state_are_those_of_one_process(session, spec, monkeypatch):
    """Every bit, of the same path: where there are sums, that is torch's on several ranks and kernels' on one."""
    expected = alone(spec)
    rule = RULES[memopt.parse(spec).rule]

    def sums(p):  # adammini: the means of a vector that is cut between any two elements
        factored, means = "factored" in spec and p.dim() > 1, rule.name == "adammini" and p.dim() < 2
        return not rule.element_wise or factored or means

    if any(sums(p) for p, _ in expected.values()):
        for whole, (p, _) in zip(session[0]["specs"][spec]["model"], expected.values(), strict=True):
            assert (whole - p).abs().max() <= RTOL * p.abs().max()
        monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
        expected.update({name: found for name, found in alone(spec).items() if sums(found[0])})
    for i, (name, (p, state)) in enumerate(expected.items()):
        for rank in session:
            assert_same_bits(rank["specs"][spec]["model"][i], p, name)
        for key, value in state.items():
            parts = [rank["specs"][spec]["state"][i][key] for rank in session]
            if all(part.shape == value.shape for part in parts):  # the step, and means that every rank has
                assert all(torch.equal(part, value) for part in parts)
            else:
                assert_same_bits(torch.cat([q.reshape(-1) for q in parts]), value.reshape(-1), f"{name} {key}")


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_of_each_rank_are_the_ledgers(session, spec):
    for r, rank in enumerate(session):
        assert rank["specs"][spec]["same_ledger"], r
        assert rank["specs"][spec]["same_price"], r
        assert rank["specs"][spec]["same_bytes"], r
        assert f"rank {r} of {WORLD}" in rank["specs"][spec]["explain"]


@pytest.mark.parametrize("spec", ["adamw-8bit/zero2", "adamw-8bit/zero3"])
def test_a_sharded_model_trains_as_one_process_does(session, spec):
    alone = train_blocks("adamw-8bit", 1)
    for rank in session:
        for a, b, c in zip(alone, rank["blocks"][spec], rank["two"]["hsdp"], strict=True):
            # The gradient is a mean over ranks: summed in another order, amplified by Adam where it is nearly zero.
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "spec"), [("rows", "adamw-8bit"), ("replicas", "adafactor"), ("columns", "adamw"), ("twice", "adafactor")]
)
def test_meshes_of_two_dimensions(session, name, spec):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(255, 70))
    opt = memopt.create([("w", p)], spec)
    for step in range(3):
        p.grad = torch.randn(255, 70, generator=torch.Generator().manual_seed(step))
        opt.step()
    for rank in session:
        got, same_ledger = rank["two"][name]
        assert same_ledger
        assert (got - p).abs().max() <= RTOL * p.abs().max()


def test_columns_are_refused_where_rows_must_be_whole(session):
    for spec in ("adamw-8bit/zero3", "adafactor/zero3", "adafactor-32bit/zero3"):
        assert "overrides={'w': '32bit'}" in session[0]["two"][spec]


def test_a_parameter_that_is_not_as_the_spec_says_is_refused(session):
    for rank in session:
        found = rank["refusals"]
        assert "odd is whole on this rank" in found["whole"][0]
        assert "memopt.shard(model, spec)" in found["whole"][0]
        assert "write 'adamw-8bit/zero3'" in found["plain"][0]
        assert "write 'adamw-8bit/zero3'" in found["zero1"][0]
        assert all(states == 0 for _, states in found.values())


def test_a_nan_on_one_rank_skips_the_step_on_all(session):
    for r, rank in enumerate(session):
        skipped, same, messages = rank["nan"]
        assert skipped == 1
        assert same
        assert ("odd" if r == WORLD - 1 else "a parameter on another rank") in messages[0]


def test_statistics_of_many_parameters_share_their_collectives(session):
    """60 parameters: RMS of the parameter, column sums, RMS of the update, and whether a gradient is bad."""
    assert all(rank["collectives"] <= 4 for rank in session)


def test_a_spec_that_shards_nothing_is_refused_by_shard():
    with pytest.raises(memopt.SpecError, match="specs that do end in /zero2, /zero3"):
        memopt.shard(nn.Linear(2, 2), "adamw/zero1")


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
