"""Which cores of a machine the steps on the host take, where several ranks share it; torch is not imported.

A rank's share is what it may use, divided by the ranks that may use the same: cores (of two hardware threads one) in
the affinity mask, and no more than a container's quota. A mask that is narrower than the launcher's was cut for this
rank alone. Where the share lies on several NUMA nodes the ranks are laid over them: each beside its card where the
system says where that is, else in the order of their local ranks. Threads are bound for the time of a step alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

from memopt.core.hyperparameters import SpecError

#: Says how many threads a step on the host takes: ``share``, ``torch`` or a number.
VARIABLE = "MEMOPT_HOST_THREADS"
#: What says how many threads torch takes, and what is in the environment of torchrun's processes.
THREADS, TORCHRUN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "TORCHELASTIC_RUN_ID"
#: What a launcher calls a rank of this machine and their number: torchrun, accelerate and DeepSpeed; Open MPI; MPICH
#: and Intel MPI; MVAPICH.
LAUNCHERS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@final
class HostTopology:
    """What the system says of this machine, below ``root``, in which a test may lay out another."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    @cached_property
    def nodes(self) -> dict[int, frozenset[int]]:
        """The processors of each NUMA node that has some; empty where the system does not say."""
        found = {}
        for folder in self.root.glob("sys/devices/system/node/node[0-9]*"):
            cpus = _listed(self._read(folder / "cpulist"))
            if cpus:
                found[int(folder.name.removeprefix("node"))] = cpus
        return dict(sorted(found.items()))

    def cores(self, cpus: frozenset[int]) -> int:
        """Cores among these processors: hardware threads of one count once."""
        siblings = set()
        for cpu in cpus:
            text = self._read(self.root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            siblings.add(_listed(text) or frozenset((cpu,)))
        return len(siblings)

    @cached_property
    def quota(self) -> float | None:
        """Processors' worth of time that a container allows; None where nothing limits it."""
        found = []
        for line in self._read(self.root / "proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            base = self.root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            if controllers and "cpu" not in controllers.split(","):
                continue
            folder = Path(path.lstrip("/"))
            for one in (folder, *folder.parents):
                limit, period = self._limit(base / one, bool(controllers))
                if limit > 0 and period > 0:
                    found.append(limit / period)
        return min(found, default=None)

    def _limit(self, folder: Path, first_version: bool) -> tuple[int, int]:
        if first_version:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [self._read(folder / name).strip() for name in names]
        else:
            words = self._read(folder / "cpu.max").split()
        with suppress(ValueError):
            limit, period = map(int, words)
            return limit, period
        return 0, 0  # "max", or nothing there

    def node_of_card(self, address: str) -> int | None:
        """The NUMA node of the card at this PCI address; None where the system does not say."""
        text = self._read(self.root / f"sys/bus/pci/devices/{address}/numa_node").strip()
        return int(text) if text.isdigit() else None

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text()
        except OSError:
            return ""


def _listed(text: str) -> frozenset[int]:
    """The numbers of a list as the system writes it.

    >>> sorted(_listed("0-2,8"))
    [0, 1, 2, 8]
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


class HostCores(NamedTuple):
    """``cores`` are those that this process may use, ``share`` how many of them are this rank's; ``nodes`` the NUMA
    nodes to which its steps are bound, and ``cpus`` their processors: none where they are not bound. ``torch_takes``
    are the numbers of threads that torch begins with, ``environment`` the variables that say another."""

    cores: int
    share: int
    local_rank: int
    local_ranks: int
    nodes: tuple[int, ...]
    cpus: frozenset[int]
    torch_takes: tuple[int, ...]
    environment: Mapping[str, str]

    def threads(self, torch_has: int) -> int:
        """How many a step takes where torch has so many."""
        asked = self.environment.get(VARIABLE, "")
        if asked.isdigit() and int(asked):
            return int(asked)
        if asked == "share":
            return self.share
        if asked not in ("", "torch"):
            raise SpecError(f"{VARIABLE}={asked!r} is not allowed; it is share, torch or a number of threads > 0")
        by_itself = not self._of_environment and torch_has in self.torch_takes
        return min(torch_has, self.share) if by_itself and not asked else torch_has

    @property
    def _of_environment(self) -> str:
        return next((name for name in THREADS if self.environment.get(name)), "")

    def starved(self, torch_has: int) -> str:
        """What to say where a launcher has left one of several ranks fewer threads than it might have; else nothing."""
        name, threads = self._of_environment, self.threads(torch_has)
        if not name or VARIABLE in self.environment or threads >= self.share or self.local_ranks < 2:
            return ""
        by = " (torchrun sets it where nothing else is said)" if TORCHRUN in self.environment else ""
        return (
            f"{name}={self.environment[name]}{by} leaves a step on the host {threads} of the {self.share} cores that "
            f"are this rank's share: {name}={self.share}, or {VARIABLE}=share for these steps alone"
        )

    def explain(self, torch_has: int) -> str:
        """Half a sentence: how many threads a step takes, of what and where."""
        threads, asked = self.threads(torch_has), self.environment.get(VARIABLE)
        of = f"{threads} thread{'s' * (threads != 1)} for steps on the host"
        if self.local_ranks > 1:
            of += f", rank {self.local_rank} of {self.local_ranks} on {self.cores} cores"
        else:
            of += f" on {self.cores} core{'s' * (self.cores != 1)}"
        if asked:
            of += f" ({VARIABLE}={asked})"
        if self.nodes:
            of += f", bound to NUMA node{'s' * (len(self.nodes) > 1)} {', '.join(map(str, self.nodes))}"
        return "; ".join(filter(None, (of, self.starved(torch_has))))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around a step on the host: this many threads, and this one on the processors of the nodes, as are those that
        it makes meanwhile."""
        import torch

        before = torch.get_num_threads()
        mask = os.sched_getaffinity(0) if self.cpus else None
        threads = self.threads(before)
        try:
            if mask is not None:
                _bind(self.cpus)
            if threads != before:
                torch.set_num_threads(threads)
            yield
        finally:
            if threads != before:
                torch.set_num_threads(before)
            if mask is not None:
                _bind(mask)


def taken(cores: HostCores | None) -> AbstractContextManager[None]:
    """:meth:`HostCores.taken`, where there are any to be taken."""
    return nullcontext() if cores is None else cores.taken()


def _bind(cpus: frozenset[int] | set[int]) -> None:
    with suppress(OSError):  # taken from this process meanwhile
        os.sched_setaffinity(0, cpus)


def host_cores(
    machine: HostTopology,
    environment: Mapping[str, str],
    mask: frozenset[int],
    launcher: frozenset[int],
    addresses: Callable[[], Sequence[str]] = tuple,
) -> HostCores:
    """The cores of this rank.

    Args:
        machine: what the system says.
        environment: in which launchers name the rank.
        mask: the processors that this process may use.
        launcher: those that the process which started it may use.
        addresses: the PCI addresses of the cards, that of local rank i at i; empty where that is not known.
    """
    rank, ranks = _local_rank(environment)
    sharing = 1 if mask < launcher else ranks  # a narrower one was cut for this rank alone
    torch_takes = machine.cores(mask), len(mask)
    cores = torch_takes[0]
    if machine.quota is not None:
        cores = max(1, min(cores, int(machine.quota)))
    share = max(1, cores // sharing)
    nodes: tuple[int, ...] = ()
    cpus: frozenset[int] = frozenset()
    mine = {node: cpus & mask for node, cpus in machine.nodes.items() if cpus & mask}
    if sharing > 1 and len(mine) > 1 and environment.get(VARIABLE) != "torch":
        by_rank = _laid_over(machine, list(mine), ranks, addresses())
        nodes = by_rank[rank]
        cpus = frozenset().union(*(mine[node] for node in nodes))
        share = min(share, max(1, machine.cores(cpus) // by_rank.count(nodes)))
    said = {name: environment[name] for name in (VARIABLE, *THREADS, TORCHRUN) if name in environment}
    return HostCores(cores, share, rank, ranks, nodes, cpus, torch_takes, said)


def _laid_over(
    machine: HostTopology, nodes: Sequence[int], ranks: int, addresses: Sequence[str]
) -> list[tuple[int, ...]]:
    """The nodes of each rank."""
    beside = [machine.node_of_card(address) for address in addresses[:ranks]]
    if len(beside) == ranks and all(node in nodes for node in beside):
        return [(node,) for node in beside if node is not None]
    count = len(nodes)
    begin = [rank * count // ranks for rank in range(ranks + 1)]
    return [tuple(nodes[start : max(start + 1, stop)]) for start, stop in pairwise(begin)]


def _local_rank(environment: Mapping[str, str]) -> tuple[int, int]:
    """This rank of this machine, and how many there are."""
    for rank, ranks in LAUNCHERS:
        if environment.get(rank, "").isdigit() and environment.get(ranks, "").isdigit():
            return int(environment[rank]), max(1, int(environment[ranks]))
    local, per_node = environment.get("SLURM_LOCALID", ""), environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    first = per_node.partition(",")[0].partition("(")[0]  # of "4(x2),3"
    return (int(local), max(1, int(first))) if local.isdigit() and first.isdigit() else (0, 1)


@lru_cache(maxsize=1)
def of_this_rank() -> HostCores | None:
    """Those of this process; None where the system has no affinity masks."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    mask = frozenset(os.sched_getaffinity(0))
    try:
        launcher = frozenset(os.sched_getaffinity(os.getppid()))
    except OSError:
        launcher = mask
    found = host_cores(HostTopology(), dict(os.environ), mask, launcher, _addresses)
    found.threads(1)  # what the variable says
    return found


def _addresses() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    cards: list[Any] = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not all(hasattr(card, "pci_domain_id") for card in cards):  # not in torch 2.6
        return []
    return [f"{c.pci_domain_id:04x}:{c.pci_bus_id:02x}:{c.pci_device_id:02x}.0" for c in cards]
