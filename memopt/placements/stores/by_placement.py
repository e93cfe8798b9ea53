"""The placements' stores of one optimizer's state, by placement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memopt.core.ledger import Line
from memopt.core.rows import Rows
from memopt.layout.chunks import ChunkedState, StoreOptions
from memopt.placements import PLACEMENTS
from memopt.placements.base import PlacementStore, StepFunction
from memopt.placements.host_cores import HostCores, of_this_rank
from memopt.spec.placement_options import of_placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.kernels import Streaming
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.placements.stores.durable_directory import Directory
    from memopt.spec import OptimSpec


def chunked(layout: ParamLayout) -> ChunkedState:
    """The rows of a parameter with its state, for cutting."""

    def lines(some: Rows) -> list[Line]:
        return layout.at(some).lines("")[1:]

    whole = not layout.rule.element_wise or "cautious" in layout.modifiers
    return ChunkedState(layout.rows, lines, whole, layout.dtype)


class PlacementStores:
    """One store for each placement that ``spec`` uses. Those of ``before`` are kept where nothing about them changes,
    of
    the first that has one."""

    def __init__(self, spec: OptimSpec, rank: int, world_size: int, *before: PlacementStores) -> None:
        self.spec = spec
        self._placement_stores: dict[str, PlacementStore] = {}
        self._settings: dict[str, StoreOptions] = {}
        for name in sorted(spec.placements):
            store_options = StoreOptions(of_placement(spec.options, name), str(spec), rank, world_size)
            same = (
                b._placement_stores[name]
                for b in before
                if name in b._placement_stores
                and b._settings[name]._replace(spec="") == store_options._replace(spec="")
            )
            self._placement_stores[name] = next(same, None) or PLACEMENTS[name].placement_store(store_options)
            self._settings[name] = store_options

    def __iter__(self) -> Iterator[PlacementStore]:
        return iter(self._placement_stores.values())

    def of(self, name: str) -> PlacementStore:
        """The store of a parameter's state."""
        return self._placement_stores[self.spec.for_parameter(name)[1]]

    def in_place(self, name: str, device: torch.device) -> bool:
        return self.of(name).in_place(device)

    def streaming(self, works: Sequence[Work]) -> Streaming | None:
        """How these works, all of one store, are stepped where that is the same in every step; None where it is not."""
        stores = {id(store): store for store in (self.of(work.name) for work in works)}
        return next(iter(stores.values())).streaming(works, self._chunked) if len(stores) == 1 else None

    @property
    def streams_alike(self) -> bool:
        return any(placement_store.streams_alike for placement_store in self._placement_stores.values())

    @property
    def elsewhere(self) -> bool:
        """Whether any state is not simply in memory."""
        return any(type(placement_store) is not PlacementStore for placement_store in self._placement_stores.values())

    @property
    def takes_params(self) -> bool:
        """Whether any wants to be told of parameters and gradients."""
        return any(placement_store.takes_params for placement_store in self._placement_stores.values())

    @property
    def copyable(self) -> bool:
        return all(placement_store.copyable for placement_store in self._placement_stores.values())

    def validate_existing(self, lines: Callable[[], Mapping[str, Sequence[Line]]]) -> None:
        for placement_store in self._placement_stores.values():
            placement_store.validate_existing(lines)

    @property
    def durable(self) -> Directory | None:
        """What is kept beyond this process, where it is."""
        return next(
            (
                placement_store.durable
                for placement_store in self._placement_stores.values()
                if placement_store.durable is not None
            ),
            None,
        )

    def host_cores(self, parameters: Iterable[tuple[str, Tensor]]) -> HostCores | None:
        """The cores of this rank, if some of these parameters are stepped on the host beside the work of a device."""
        import torch

        beside = torch.accelerator.is_available()
        if not beside and not any(store.placement.steps_on_host for store in self):
            return None
        for name, p in parameters:
            placement_store = self.of(name)
            if placement_store.placement.steps_on_host and not placement_store.in_place(p.device):
                return of_this_rank()
            if beside and p.is_cpu:
                return of_this_rank()
        return None

    def check(self) -> None:
        for placement_store in self._placement_stores.values():
            placement_store.check()

    def step(self, works: Sequence[Work], run: StepFunction) -> None:
        """Step the works, those of each home at once."""
        if len(self._placement_stores) == 1:
            next(iter(self._placement_stores.values())).step(works, run, self._chunked)
            return
        groups: dict[int, tuple[PlacementStore, list[Work]]] = {}
        for work in works:
            placement_store = self.of(work.name)
            groups.setdefault(id(placement_store), (placement_store, []))[1].append(work)
        # What a card steps as it lies is begun first: it works while the host does.
        for placement_store, mine in sorted(groups.values(), key=lambda one: type(one[0]) is not PlacementStore):
            placement_store.step(mine, run, self._chunked)

    @staticmethod
    def _chunked(work: Work) -> ChunkedState:
        return chunked(work.layout)

    def prepare(self, states: Mapping[str, tuple[ChunkedState, torch.device]], also: bool = False) -> None:
        """These are the parameters that have state; ``also``: besides those of before."""
        by_store: dict[tuple[int, torch.device], tuple[PlacementStore, dict[str, ChunkedState]]] = {}
        for name, (one, device) in states.items():
            placement_store = self.of(name)
            by_store.setdefault((id(placement_store), device), (placement_store, {}))[1][name] = one
        for (_, device), (placement_store, mine) in by_store.items():
            placement_store.prepare(mine, device, also)

    def register_params(self, parameters: Iterable[tuple[str, Tensor, ChunkedState, bool]]) -> None:
        """These are the parameters; those with True may give their gradients away in ``backward()``."""
        by_store: dict[str, dict[str, tuple[Tensor, ChunkedState, bool]]] = {
            placement: {} for placement in self._placement_stores
        }
        for name, *rest in parameters:
            by_store[self.spec.for_parameter(name)[1]][name] = tuple(rest)  # type: ignore[assignment]
        for placement, placement_store in self._placement_stores.items():
            placement_store.register_params(by_store[placement])

    def synchronize(self) -> None:
        for placement_store in self._placement_stores.values():
            placement_store.synchronize()

    def abandon(self) -> None:
        """Nothing of an interrupted step is under way any more."""
        for placement_store in self._placement_stores.values():
            placement_store.abandon()

    def commit(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make what survives this process complete: all states, by parameter."""
        for placement, placement_store in self._placement_stores.items():
            placement_store.commit({n: s for n, s in states.items() if self.spec.for_parameter(n)[1] == placement})

    def workspace(self) -> list[Line]:
        return [line for placement_store in self._placement_stores.values() for line in placement_store.workspace()]

    def replaced_by(self, after: PlacementStores, empty: bool = True) -> None:
        """Close the placements' stores that ``after`` does not have; ``empty``: their state has moved there."""
        staying = {id(placement_store) for placement_store in after._placement_stores.values()}
        for placement_store in self._placement_stores.values():
            if id(placement_store) not in staying:
                placement_store.close(empty)

    def close(self) -> None:
        for placement_store in self._placement_stores.values():
            placement_store.close()
