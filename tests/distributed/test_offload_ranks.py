"""``@cpu`` with ``offload_gradients`` under fully_shard on two ranks: the reduced shards leave the device in
``backward()``, and parameters and state are, to the bit, those of gradients that stay. Each rank's device is simulated.
"""

import pytest
import torch
from torch import nn

import memopt
from memopt.placements.gradients.host_grad import HostGradient, local_gradient
from tests.helpers import ranks, simulated
from tests.helpers.cases import HYPER, assert_same_bits
from tests.helpers.offloading import EVEN

SPECS = [
    "adamw@cpu/zero3",
    "adamw-8bit@cpu/zero2",
    "lion-4bit@cpu/zero3",
    "adafactor@cpu/zero3",
    "rmsprop-fp8@cpu/zero3",
    "muon-8bit@cpu/zero3",
]
USES = ["accumulated", "accumulated without reducing", "clipped", "clipped by torch", "scaled", "released", "early"]
USES += ["replicas"]
STEPS = 2


class Blocks(nn.Module):
    """Rows that two ranks cannot share evenly, and a vector that they cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(67, 67) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def steps(spec, use, threads, **options):
    """Whole parameters, what is here of the state, and where the last gradients are."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from memopt.placements.transfer import device

    made = (
        simulated.ThreadedBus()
        if threads
        else simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(EVEN))
    )
    device.TRANSFERS["cpu"] = lambda where: made
    torch.manual_seed(0)
    model = Blocks()
    # What is in one shard is whole on each rank, and its gradient is averaged as DistributedDataParallel does.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "shard")) if use == "replicas" else None
    memopt.shard(model, spec, mesh=mesh)
    if not threads:  # a second of the backward pass for each shard that is reduced; this hook comes before those
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: made.clock.submit("backward", list, [], 0) and None)
    opt = memopt.create(model, spec, **HYPER.get(memopt.parse(spec).rule, {}), **options)
    if use == "released":
        opt.release_gradients(model)
    scaler = torch.amp.GradScaler("cpu", enabled=use == "scaled", init_scale=2.0**10)
    norms = []
    for step in range(STEPS):
        parts = 2 if use.startswith("accumulated") else 1
        for part in range(parts):
            x = torch.randn(8, 67, generator=torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank()))
            if use == "scaled" and step == 1 and dist.get_rank() == 1:
                x[0] = float("inf")
            if use == "accumulated without reducing":
                model.set_requires_gradient_sync(part == parts - 1)
            scaler.scale(model(x)).backward()
        if use == "clipped":
            norms.append(float(memopt.clip_grad_norm_(opt, 1e-3)))
        if use == "clipped by torch":
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).full_tensor()))
        scaler.step(opt)
        scaler.update()
        left = [isinstance(local_gradient(p), HostGradient) for p in model.parameters()]
        opt.zero_grad()
    explained = opt.explain()
    del device.TRANSFERS["cpu"]
    return {
        "parameters": [p.full_tensor().detach() for p in model.parameters()],
        "state": [opt.state[p] for p in model.parameters()],
        "norms": norms,
        "whole": all(p.to_local().shape == p.shape for p in model.parameters()),
        "left": left,
        "priced": opt.ledger() == memopt.price(model, opt.spec, device="cuda"),
        "explain": explained,
        "timeline": "" if threads else made.clock.timeline(),
        "spans": [] if threads else [(op.stream, op.begin, op.end) for op in made.clock.trace],
    }


def on_two_ranks():
    found = {}
    for i, spec in enumerate(SPECS):
        stays = steps(spec, "", False)
        found[spec] = stays, steps(spec, "", i % 2 == 1, offload_gradients=True, workspace="1MiB")
    for i, use in enumerate(USES):
        spec, how = SPECS[i % 2], "early" if use == "early" else True
        found[use] = steps(spec, use, False), steps(spec, use, i % 2 == 0, offload_gradients=how, workspace="1MiB")
    said = []
    for wrap in (nn.parallel.DistributedDataParallel, lambda m: m):  # the spec does not know of either
        from memopt.placements.transfer import device

        made = simulated.ThreadedBus()
        device.TRANSFERS["cpu"] = lambda where, made=made: made
        model = nn.Linear(67, 67)
        opt = memopt.create(model, "adamw@cpu", offload_gradients=True)
        try:
            wrap(model)(torch.ones(2, 67)).sum().backward()
        except RuntimeError as error:
            said.append(str(error))
        assert opt is not None
        del device.TRANSFERS["cpu"]
    return found, said, buckets()


def buckets():
    """Bytes of DistributedDataParallel's buckets, of the gradients, and where these stand from pass to pass."""
    model = nn.Linear(67, 67)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    places = []
    for _ in range(4):
        wrapped(torch.ones(2, 67)).sum().backward()
        places.append([p.grad.data_ptr() for p in model.parameters()])
        model.zero_grad()
    sizes = wrapped._get_ddp_logging_data()["bucket_sizes"]
    return sum(map(int, str(sizes).split(","))), sum(p.nbytes for p in model.parameters()), places[1:]


@pytest.fixture(scope="module")
def two_ranks():
    return ranks.run(on_two_ranks, 2)


@pytest.mark.parametrize("case", [*SPECS, *USES])
def test_bits_are_those_of_gradients_that_stay(two_ranks, case):
    for found, *_ in two_ranks:
        stays, leaves = found[case]
        assert stays["norms"] == leaves["norms"]
        assert leaves["whole"] == (case == "replicas")
        assert case not in ("clipped", "clipped by torch") or min(stays["norms"]) > 1e-3
        for p, q in zip(stays["parameters"], leaves["parameters"], strict=True):
            assert_same_bits(p, q)
        for mine, other in zip(stays["state"], leaves["state"], strict=True):
            assert mine.keys() == other.keys()
            for key, x in mine.items():
                assert_same_bits(local(x), local(other[key]))
        assert leaves["priced"]
        assert set(leaves["left"]) == {case not in ("released", "early")}
        words = {"early": "gradients come down in backward()"}.get(case, "gradients go to pinned memory in backward()")
        assert words in leaves["explain"]


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def test_replicas_are_refused_in_backward_with_the_reason(two_ranks):
    for _, said, _ in two_ranks:
        assert len(said) == 2
        for sentence in said:
            assert "is whole on each of 2 ranks" in sentence
            assert "write '/zero2' or '/zero3'" in sentence
            assert "a mesh of (2, 1)" in sentence


def test_distributed_data_parallel_keeps_room_for_all_gradients(two_ranks):
    """Why replicas are refused: what would leave is there, in the same place, whatever becomes of ``p.grad``."""
    for *_, (in_buckets, of_gradients, places) in two_ranks:
        assert in_buckets >= of_gradients
        assert places.count(places[0]) == len(places) == 3


def test_shards_leave_while_the_backward_pass_goes_on(two_ranks):
    """Both ranks' time lines: a shard is on its way in the second in which the next is made."""
    for found, *_ in two_ranks:
        _, leaves = found["adamw@cpu/zero3"]
        first = [(stream, begin) for stream, begin, _ in leaves["spans"] if stream in ("backward", "down")][:8]
        assert first == [(s, i + (s == "down")) for i in range(4) for s in ("backward", "down")], leaves["timeline"]
