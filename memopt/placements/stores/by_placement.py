"""The homes of one optimizer's state, by placement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memopt.core.ledger import Line
from memopt.core.rows import Rows
from memopt.layout.chunks import Held, Setting
from memopt.placements import PLACEMENTS
from memopt.placements.base import Home, Run
from memopt.spec.placement_options import of_placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.placements.stores.durable_directory import Directory
    from memopt.spec import OptimSpec


def held(layout: ParamLayout) -> Held:
    """The rows of a parameter with its state, for cutting."""

    def lines(some: Rows) -> list[Line]:
        return layout.at(some).lines("")[1:]

    return Held(layout.rows, lines, not layout.rule.element_wise, layout.dtype)


class Homes:
    """One home for each placement that ``spec`` uses. Those of ``before`` are kept where nothing about them changes, of
    the first that has one."""

    def __init__(self, spec: OptimSpec, rank: int, world_size: int, *before: Homes) -> None:
        self.spec = spec
        self._homes: dict[str, Home] = {}
        self._settings: dict[str, Setting] = {}
        for name in sorted(spec.placements):
            setting = Setting(of_placement(spec.options, name), str(spec), rank, world_size)
            same = (
                b._homes[name]
                for b in before
                if name in b._homes and b._settings[name]._replace(spec="") == setting._replace(spec="")
            )
            self._homes[name] = next(same, None) or PLACEMENTS[name].home(setting)
            self._settings[name] = setting

    def __iter__(self) -> Iterator[Home]:
        return iter(self._homes.values())

    def of(self, name: str) -> Home:
        """The home of a parameter's state."""
        return self._homes[self.spec.for_parameter(name)[1]]

    def in_place(self, name: str, device: torch.device) -> bool:
        return self.of(name).in_place(device)

    @property
    def elsewhere(self) -> bool:
        """Whether any state is not simply in memory."""
        return any(type(home) is not Home for home in self._homes.values())

    @property
    def watches(self) -> bool:
        """Whether any wants to be told of parameters and gradients."""
        return any(home.watches for home in self._homes.values())

    @property
    def copyable(self) -> bool:
        return all(home.copyable for home in self._homes.values())

    def expect(self, lines: Callable[[], Mapping[str, Sequence[Line]]]) -> None:
        for home in self._homes.values():
            home.expect(lines)

    @property
    def durable(self) -> Directory | None:
        """What is kept beyond this process, where it is."""
        return next((home.durable for home in self._homes.values() if home.durable is not None), None)

    def check(self) -> None:
        for home in self._homes.values():
            home.check()

    def step(self, works: Sequence[Work], run: Run) -> None:
        """Step the works, those of each home at once."""
        if len(self._homes) == 1:
            next(iter(self._homes.values())).step(works, run, self._held)
            return
        groups: dict[int, tuple[Home, list[Work]]] = {}
        for work in works:
            home = self.of(work.name)
            groups.setdefault(id(home), (home, []))[1].append(work)
        for home, mine in groups.values():
            home.step(mine, run, self._held)

    @staticmethod
    def _held(work: Work) -> Held:
        return held(work.layout)

    def prepare(self, states: Mapping[str, tuple[Held, torch.device]], also: bool = False) -> None:
        """These are the parameters that have state; ``also``: besides those of before."""
        by_home: dict[tuple[int, torch.device], tuple[Home, dict[str, Held]]] = {}
        for name, (one, device) in states.items():
            home = self.of(name)
            by_home.setdefault((id(home), device), (home, {}))[1][name] = one
        for (_, device), (home, mine) in by_home.items():
            home.prepare(mine, device, also)

    def watch(self, parameters: Iterable[tuple[str, Tensor, Held, bool]]) -> None:
        """These are the parameters; those with True may give their gradients away in ``backward()``."""
        by_home: dict[str, dict[str, tuple[Tensor, Held, bool]]] = {placement: {} for placement in self._homes}
        for name, *rest in parameters:
            by_home[self.spec.for_parameter(name)[1]][name] = tuple(rest)  # type: ignore[assignment]
        for placement, home in self._homes.items():
            home.watch(by_home[placement])

    def settle(self) -> None:
        for home in self._homes.values():
            home.settle()

    def abandon(self) -> None:
        """Nothing of an interrupted step is under way any more."""
        for home in self._homes.values():
            home.abandon()

    def commit(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make what survives this process complete: all states, by parameter."""
        for placement, home in self._homes.items():
            home.commit({n: s for n, s in states.items() if self.spec.for_parameter(n)[1] == placement})

    def workspace(self) -> list[Line]:
        return [line for home in self._homes.values() for line in home.workspace()]

    def replaced_by(self, after: Homes, empty: bool = True) -> None:
        """Close the homes that ``after`` does not have; ``empty``: their state has moved there."""
        kept = {id(home) for home in after._homes.values()}
        for home in self._homes.values():
            if id(home) not in kept:
                home.close(empty)

    def close(self) -> None:
        for home in self._homes.values():
            home.close()
