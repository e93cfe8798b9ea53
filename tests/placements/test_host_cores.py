"""Which cores steps on the host take: made-up machines, and the real one's two processors as its NUMA nodes."""

import os

import pytest
import torch

import memopt
from memopt.placements.host_cores import HostCores, HostTopology, host_cores, taken
from memopt.placements.stores import by_placement
from memopt.placements.stores import cpu as cpu_store
from memopt.placements.transfer import device as transfers
from tests.helpers import simulated
from tests.helpers.cases import assert_same_bits

#: 16 processors on two nodes, hardware threads i and i + 8 of one core.
ALL = frozenset(range(16))
NODES = {0: "0-3,8-11", 1: "4-7,12-15"}
RANKS = {"LOCAL_WORLD_SIZE": "4"}


def laid_out(root, nodes=NODES, cards=(), **files):
    for node, cpus in nodes.items():
        written(root / f"sys/devices/system/node/node{node}/cpulist", cpus)
    for cpu in ALL:
        text = f"{cpu % 8},{cpu % 8 + 8}"
        written(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)
    for i, node in enumerate(cards):
        written(root / f"sys/bus/pci/devices/card{i}/numa_node", str(node))
    for name, text in files.items():
        written(root / name.replace("__", "/").replace("_dot_", "."), text)
    return HostTopology(root)


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def of_ranks(machine, count, mask=ALL, launcher=ALL, addresses=(), **environment):
    return [
        host_cores(
            machine,
            {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), **environment},
            frozenset(mask),
            frozenset(launcher),
            lambda: addresses,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "share", "nodes"),
    [
        (1, 8, [()]),
        (2, 4, [(0,), (1,)]),
        (4, 2, [(0,), (0,), (1,), (1,)]),
        (3, 2, [(0,), (0,), (1,)]),
        (16, 1, [(0,)] * 8 + [(1,)] * 8),
    ],
)
def test_cores_and_nodes_are_divided(tmp_path, count, share, nodes):
    found = of_ranks(laid_out(tmp_path), count)
    assert [one.nodes for one in found] == nodes
    assert [one.share for one in found] == [share] * count
    assert all(one.cpus == frozenset().union(*(HostTopology(tmp_path).nodes[n] for n in one.nodes)) for one in found)


def test_fewer_ranks_than_nodes_have_several(tmp_path):
    quarters = {i: f"{2 * i}-{2 * i + 1},{2 * i + 8}-{2 * i + 9}" for i in range(4)}
    found = of_ranks(laid_out(tmp_path, quarters), 2)
    assert [(one.nodes, one.share) for one in found] == [((0, 1), 4), ((2, 3), 4)]


def test_a_rank_is_beside_its_card_where_that_is_known(tmp_path):
    machine = laid_out(tmp_path, cards=(1, 1, 0, 1))
    addresses = [f"card{i}" for i in range(4)]
    found = of_ranks(machine, 4, addresses=addresses)
    assert [(one.nodes, one.share) for one in found] == [((1,), 1), ((1,), 1), ((0,), 2), ((1,), 1)]
    written(tmp_path / "sys/bus/pci/devices/card2/numa_node", "-1")  # the system does not know
    assert [one.nodes for one in of_ranks(machine, 4, addresses=addresses)] == [(0,), (0,), (1,), (1,)]
    assert [one.nodes for one in of_ranks(machine, 4, addresses=addresses[:1])] == [(0,), (0,), (1,), (1,)]


def test_a_mask_that_a_launcher_cut_is_this_ranks_alone(tmp_path):
    """taskset or a container before the launcher is shared by its ranks; srun, mpirun and numactl cut for one."""
    machine = laid_out(tmp_path)
    shared = of_ranks(machine, 2, mask=range(4), launcher=range(4))[1]
    own = of_ranks(machine, 2, mask=range(4))[1]
    assert (shared.share, own.share, shared.nodes, own.nodes) == (2, 4, (), ())


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1)),
        ({"LOCAL_RANK": "3"}, (0, 1)),
        ({"LOCAL_RANK": "3", **RANKS}, (3, 4)),
        ({"LOCAL_RANK": "3", "LOCAL_SIZE": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 2)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, (2, 4)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "?"}, (0, 1)),
    ],
)
def test_launchers(tmp_path, environment, found):
    one = host_cores(laid_out(tmp_path), environment, ALL, ALL)
    assert (one.local_rank, one.local_ranks) == found


@pytest.mark.parametrize(
    "files",
    [
        {"proc__self__cgroup": "0::/job/step", "sys__fs__cgroup__job__cpu_dot_max": "450000 100000"},
        {"proc__self__cgroup": "0::/", "sys__fs__cgroup__cpu_dot_max": "400000 100000"},
        {
            "proc__self__cgroup": "4:cpu,cpuacct:/\n3:memory:/x",
            "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "400000",
            "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000",
        },
    ],
)
def test_a_containers_quota_counts(tmp_path, files):
    machine = laid_out(tmp_path, **files)
    assert [one.share for one in of_ranks(machine, 2)] == [2, 2]
    [alone] = of_ranks(machine, 1)
    assert (alone.share, alone.threads(8), alone.threads(3)) == (4, 4, 3)
    unlimited = laid_out(tmp_path / "other", proc__self__cgroup="0::/", sys__fs__cgroup__cpu_dot_max="max 100000")
    assert unlimited.quota is None


@pytest.mark.parametrize(
    ("environment", "torch_has", "threads"),
    [
        ({}, 8, 2),  # all cores, as torch takes them on every rank
        ({}, 16, 2),  # or all processors
        ({}, 1, 1),
        ({}, 5, 5),  # torch.set_num_threads
        ({"OMP_NUM_THREADS": "8"}, 8, 8),
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"OMP_NUM_THREADS": "1", "MEMOPT_HOST_THREADS": "share"}, 1, 2),
        ({"MEMOPT_HOST_THREADS": "7"}, 8, 7),
        ({"MEMOPT_HOST_THREADS": "torch"}, 8, 8),
    ],
)
def test_threads(tmp_path, environment, torch_has, threads):
    one = of_ranks(laid_out(tmp_path), 4, **environment)[1]
    assert one.threads(torch_has) == threads
    assert f"{threads} thread" in one.explain(torch_has)
    assert bool(one.nodes) == (environment.get("MEMOPT_HOST_THREADS") != "torch")
    starved = environment == {"OMP_NUM_THREADS": "1"}
    assert ("OMP_NUM_THREADS=2, or MEMOPT_HOST_THREADS=share" in one.explain(torch_has)) == starved


def test_the_variable_is_checked(tmp_path):
    for bad in ("0", "-1", "all", "1.5"):
        one = of_ranks(laid_out(tmp_path), 1, MEMOPT_HOST_THREADS=bad)[0]
        with pytest.raises(memopt.SpecError, match=f"MEMOPT_HOST_THREADS='{bad}' is not allowed"):
            one.threads(1)


# On this machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bound(monkeypatch):
    """A rank whose steps are bound to one processor, with three threads; its device is simulated."""
    mask = os.sched_getaffinity(0)
    cores = HostCores(
        2, 3, 0, 2, (5,), frozenset(list(mask)[-1:]), (torch.get_num_threads(),), {"OMP_NUM_THREADS": "1"}
    )
    cores = cores._replace(environment={"MEMOPT_HOST_THREADS": "3"})
    monkeypatch.setattr(by_placement, "of_this_rank", lambda: cores)
    monkeypatch.setattr(cpu_store, "of_this_rank", lambda: cores)
    monkeypatch.setitem(transfers.TRANSFERS, "cpu", lambda where: simulated.DeviceTransfer(where))
    return cores


@pytest.mark.parametrize("release", [False, True])
def test_a_step_is_bound_and_nothing_else(bound, release, monkeypatch):
    before, seen = (os.sched_getaffinity(0), torch.get_num_threads()), []
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(67, 67), torch.nn.Linear(67, 67)
    twin.load_state_dict(model.state_dict())
    opt, other = memopt.create(model, "adamw-8bit@cpu"), memopt.create(twin, "adamw-8bit")
    step = opt.engine.step

    class Seeing:
        @staticmethod
        def step(*args):
            seen.append((os.sched_getaffinity(0), torch.get_num_threads()))
            step(*args)

    opt.setup.engine = Seeing()
    if release:
        opt.release_gradients(model)
    for _ in range(2):
        for net, one in ((model, opt), (twin, other)):
            net(torch.ones(2, 67)).square().sum().backward()
            one.step()
            one.zero_grad()
            assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    assert set(map(str, seen)) == {str((set(bound.cpus), 3))}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q)
    monkeypatch.setattr(opt.setup, "engine", memopt.engines.ENGINES["native"])
    assert "3 threads for steps on the host, rank 0 of 2 on 2 cores" in opt.explain()
    assert "bound to NUMA node 5" in opt.explain()


def test_what_fails_inside_unbinds(bound):
    before = os.sched_getaffinity(0), torch.get_num_threads()

    def failing():
        with taken(bound):
            assert (os.sched_getaffinity(0), torch.get_num_threads()) == (bound.cpus, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before


def test_a_starved_rank_is_told_once(bound, monkeypatch):
    starved = bound._replace(environment={"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, share=48)
    monkeypatch.setattr(by_placement, "of_this_rank", lambda: starved)
    model = torch.nn.Linear(67, 67)
    opt = memopt.create(model, "adamw@cpu")
    model(torch.ones(2, 67)).sum().backward()
    with pytest.warns(UserWarning, match="OMP_NUM_THREADS=48, or MEMOPT_HOST_THREADS=share") as told:
        opt.step()
    opt.step()  # a warning is an error here
    assert "torchrun sets it" in str(told[0].message)


def test_a_cpu_that_does_all_the_work_is_torchs(monkeypatch):
    monkeypatch.setattr(by_placement, "of_this_rank", lambda: pytest.fail("asked"))
    model = torch.nn.Linear(67, 67)
    opt = memopt.create(model, "adamw")
    model(torch.ones(2, 67)).sum().backward()
    opt.step()
    assert "threads" not in opt.explain()
