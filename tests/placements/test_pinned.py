"""Pinned memory that cannot be had: a clear error, and nothing is lost."""

import contextlib
import types

import pytest
import torch

import memopt
from memopt.cli import doctor
from memopt.cli.output import places
from memopt.placements.transfer import cuda
from memopt.placements.transfer import device as transfer
from tests.helpers import simulated
from tests.helpers.cases import assert_same_bits, odd_model, train
from tests.placements.test_placements import assert_same, drive

PINNED = [("host", {}), ("cpu", {}), ("cpu", {"offload_gradients": True}), ("disk", {})]


class Scarce(simulated.DeviceTransfer):
    """Pins ``left`` pieces of memory, and then fails as CUDA does."""

    left = 10**9

    def host(self, nbytes):
        if self.left <= 0:
            raise cuda._cannot_pin(nbytes, "CUDA error 2")
        self.left -= 1
        return super().host(nbytes)


@pytest.fixture
def scarce(monkeypatch):
    made = Scarce(torch.device("cpu"))
    monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where: made)
    return made


@pytest.mark.parametrize(("place", "options"), PINNED)
@pytest.mark.parametrize("left", [0, 1, 2, 3, 7])
def test_the_first_step_says_so_changes_nothing_and_can_be_made_again(scarce, place, options, left):
    model, twin = odd_model(), odd_model()
    opt = memopt.create(model, f"adamw-8bit@{place}", workspace="1MiB", **options)
    reference = memopt.create(twin, "adamw-8bit")
    before = [p.detach().clone() for p in model.parameters()]
    scarce.left = left
    for _ in range(2):  # a second attempt changes nothing either
        try:
            drive(model, opt, 0, 1)
        except RuntimeError:
            for p, old in zip(model.parameters(), before, strict=True):
                assert_same_bits(p, old)
            assert not any(opt.state.values())
        else:
            break
    assert left or not any(opt.state.values())
    scarce.left = 10**9
    stepped = int(bool(any(opt.state.values())))
    drive(model, opt, stepped, 3 - stepped)
    drive(twin, reference, 0, 3)
    assert_same((model, opt), (twin, reference))


@pytest.mark.parametrize(("place", "options"), PINNED)
def test_a_parameter_that_comes_later(scarce, place, options):
    """State of the others is there and has stepped; it neither steps nor counts a step."""
    model, twin = odd_model(), odd_model()
    opt = memopt.create(model, f"adamw@{place}", workspace="64MiB", **options)
    reference = memopt.create(twin, "adamw")
    for m, o in ((model, opt), (twin, reference)):
        drive(m, o, 0, 2)
        o.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(600, 600)))]})
        o.param_groups[1]["params"][0].grad = torch.ones(600, 600)
    counts = [float(opt.state[p]["step"]) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    scarce.left = 0
    with pytest.raises(RuntimeError, match=r"cannot pin [0-9,]+ bytes .*nothing was changed; `memopt doctor`"):
        drive(model, opt, 2, 1)
    assert [float(opt.state[p]["step"]) for p in model.parameters()] == counts
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, old)
    scarce.left = 10**9
    for m, o in ((model, opt), (twin, reference)):
        drive(m, o, 2, 2)
    assert_same((model, opt), (twin, reference))
    assert_same_bits(opt.param_groups[1]["params"][0], reference.param_groups[1]["params"][0])


@pytest.mark.parametrize(("place", "options"), PINNED)
def test_moving_there_leaves_an_optimizer_that_goes_on(scarce, place, options):
    model, twin = odd_model(), odd_model()
    opt, reference = memopt.create(model, "adamw-8bit"), memopt.create(twin, "adamw-8bit")
    drive(model, opt, 0, 2)
    scarce.left = 0
    with pytest.raises(RuntimeError, match="cannot pin"):
        opt.convert_(f"adamw-8bit@{place}", workspace="1MiB", **options)
    scarce.left = 10**9
    drive(model, opt, 2, 2)
    drive(twin, reference, 0, 4)
    assert_same((model, opt), (twin, reference))


def test_in_the_middle_of_backward_the_gradient_stays(scarce):
    model, twin = odd_model(), odd_model()
    opt = memopt.create(model, "adamw@cpu", offload_gradients=True)
    reference = memopt.create(twin, "adamw")
    scarce.left = 1
    with pytest.raises(RuntimeError, match="cannot pin"):
        model(0).backward()
    scarce.left = 10**9
    train(model, opt, 0, 2)
    train(twin, reference, 0, 2)
    assert_same((model, opt), (twin, reference))


def test_unified_memory_is_asked_for_before_it_is_stepped(monkeypatch):
    """Where CUDA's calls are answered by ordinary memory: which state is fetched, in what order, how much at once."""
    from memopt.placements.stores import unified_memory

    happened = []
    library = types.SimpleNamespace(cprefetch=lambda at, n, where: happened.append((at.value, n.value, where.value)))
    monkeypatch.setattr(unified_memory, "_library", lambda: library)
    monkeypatch.setattr(unified_memory, "AHEAD", 1000)

    class OnCard:
        """As much of a CUDA tensor as is looked at."""

        is_cuda, device = True, torch.device("cuda", 1)

        def __init__(self, at, nbytes):
            self.at, self.nbytes = at, nbytes

        def data_ptr(self):
            return self.at

    step = types.SimpleNamespace(is_cuda=False, nbytes=4)
    works = [
        types.SimpleNamespace(
            state={"step": step, "m": OnCard(10 + i, n), "v": OnCard(20 + i, n)},
            layout=types.SimpleNamespace(tensors=("m", "v")),
        )
        for i, n in enumerate((400, 50, 480, 2000, 0, 90))
    ]
    for few in unified_memory.fetched(works):
        happened.append([works.index(work) for work in few])
    assert happened == [
        (10, 400, 1),
        (20, 400, 1),
        (11, 50, 1),
        (21, 50, 1),
        [0, 1],
        (12, 480, 1),
        (22, 480, 1),
        [2],
        (13, 2000, 1),
        (23, 2000, 1),
        [3],
        (15, 90, 1),
        (25, 90, 1),
        [4, 5],
    ]


def test_what_cuda_says_of_pinned_memory(monkeypatch):
    """The call that registers memory with the driver, answered as without room (2) and as with it."""
    registered, code = {}, 2

    class Runtime:
        @staticmethod
        def cudaHostRegister(address, nbytes, flags):
            if not code:
                registered[address] = nbytes
            return code

        @staticmethod
        def cudaHostUnregister(address):
            registered.pop(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda d: types.SimpleNamespace())
    made = cuda.CudaTransfer(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"cannot pin 5,000 bytes of host memory \(CUDA error 2\), and nothing was"):
        made.host(5000)
    code = 0
    tensor = made.host(5000)
    assert registered == {tensor.data_ptr(): 5000}
    assert tensor.tolist() == [0] * 5000
    del tensor
    assert not registered
    with pytest.raises(RuntimeError, match=r"cannot pin 4,611,686,018,427,387,904 bytes .*Cannot allocate memory"):
        made.host(2**62)


def test_doctor_says_what_limits_each_place(monkeypatch, tmp_path):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 * 2**20, 8 * 2**20))
    assert places.pinned_memory() == (True, "ulimit -l is 8 MiB; without CUDA nothing is pinned")
    assert places.unified_memory() == (True, "no CUDA device; @paged is a mapped file here")
    monkeypatch.setattr(places, "_cuda", lambda: True)
    assert "ulimit -l is 8 MiB, which the CUDA driver does not count; " in places.pinned_memory()[1]
    assert "GiB of host memory are free for @host" in places.pinned_memory()[1]
    monkeypatch.setattr(places.util, "find_spec", lambda name: None)
    assert places.unified_memory()[0] is False
    monkeypatch.setattr(places, "PROBE", 2 * places.REQUEST)
    good, text = places.disk_speed(str(tmp_path))
    assert good
    assert float(text.split("writes ")[1].split()[0]) > 0
    assert float(text.split("reads ")[1].split()[0]) > 0
    good, text = places.disk_speed(str(tmp_path / "nowhere"))
    assert not good
    assert "was not measured" in text


@pytest.mark.parametrize("version", [0, 1])
def test_doctor_knows_the_container(monkeypatch, tmp_path, version):
    limits = [tmp_path / "2", tmp_path / "1"]
    limits[version].write_text(f"{2**28}\n")
    monkeypatch.setattr(doctor, "_LIMITS", limits)
    assert doctor.memory().text.endswith("but this process is limited to 0.2 GiB")
