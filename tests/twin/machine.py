"""The pair, what it goes through, and what must be true after every operation."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

import memopt
from memopt.masters import MASTERS
from memopt.placements.transfer import device
from memopt.spec.placement_options import OPTIONS
from tests.helpers.simulated import PageBus
from tests.twin import closeness, reference
from tests.twin.bits import same
from tests.twin.cases import BOUND, LOW, ROUNDING, Case
from tests.twin.mixed import given, overridden
from tests.twin.sides import Bag, Side, kernels_off, twin_optimizer

#: What a refusal may be: an exception whose text is for a person.
REFUSALS = (RuntimeError, ValueError, TypeError, FloatingPointError)
#: What masters are kept under.
BESIDE = {master.key for master in MASTERS.values()} - {""}
#: Keys of a group that are put right when they are looked at.
NAMES = ("params", "param_names")


class Difference(AssertionError):
    """What must not be: another result than the twin's, a refusal that changed something, an error that is none."""


class Skip(Exception):
    """This operation means nothing for this pair as it is now."""


class Twin:
    """``way`` is how far the twin's weights have gone, ``rounded`` what their rounding may have cost, by name;
    ``formats`` and ``masters`` are those that state and weights have been through."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.folder = tempfile.TemporaryDirectory(prefix="twin-")
        self._patched = device.TRANSFERS.get("cpu")
        if case.bus:
            made = PageBus()
            device.TRANSFERS["cpu"] = lambda where: made
        g = torch.Generator().manual_seed(seed)
        tensors = {f"w{i}": torch.randn(shape, generator=g).to(case.dtype) for i, shape in enumerate(case.shapes)}
        self.count = len(tensors)  # of names given so far
        self.way = dict.fromkeys(tensors, 0.0)
        self.rounded = dict.fromkeys(tensors, 0.0)
        self.decayed: set[str] = set()  # those that have been stepped with a decay
        spec = memopt.parse(case.spec)
        named = {**case.overrides, "the rest": spec.fallback}
        self.formats, self.masters = {spec.format, *self._formats_of(named)}, {spec.master}
        self.checkpoints: list[tuple[str, Callable[[], tuple[Bag, Any]]]] = []
        groups = [{"params": list(tensors)[i :: case.groups]} for i in range(case.groups)]
        for i, group in enumerate(groups):
            group["lr"] = case.hyper["lr"] / (1 + i)
        model = Bag(tensors)
        self.ours = Side(model, self.create(model, groups, spec, case.hyper, case.overrides, case.options), True)
        wide = {name: x.float() if case.dtype in LOW else x.clone() for name, x in tensors.items()}
        model = Bag(wide)
        filled = [given(self.ours.opt.spec, group) for group in self.ours.opt.param_groups]
        theirs = [{"params": [getattr(model, n) for n in names]} for names in self.ours.names()]
        self.theirs = Side(
            model, twin_optimizer(case, [{**a, **b} for a, b in zip(filled, theirs, strict=True)]), False
        )
        self.released: Any = None
        self.watch: Any = None
        self.edited = False  # state was put there by hand and has not been stepped yet

    @staticmethod
    def _formats_of(overrides: Mapping[str, str]) -> set[str]:
        return {fmt for text in overrides.values() if (fmt := text.partition("@")[0].rpartition("-")[2]) in BOUND}

    def create(
        self, model: Bag, groups: list[dict[str, Any]], spec: Any, hyper: Any, overrides: Any, options: Any
    ) -> Any:
        """A memopt optimizer of these names by group; a directory of its own where there is to be one."""
        options = {k: v for k, v in options.items() if k in OPTIONS}
        if options.get("directory"):
            options["directory"] = tempfile.mkdtemp(dir=self.folder.name)
        given = [
            {**g, "params": [(n, getattr(model, n)) if self.case.named else getattr(model, n) for n in g["params"]]}
            for g in groups
        ]
        spec = overridden(spec, overrides if self.case.named else {}, self.case.rules)
        spec = spec.replace(hyper=hyper or spec.hyper, options=options)
        return memopt.create(given, spec, nonfinite=self.case.nonfinite, seed=3)

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        self.ours.opt.close()
        if self._patched is None:
            device.TRANSFERS.pop("cpu", None)
        else:
            device.TRANSFERS["cpu"] = self._patched
        self.folder.cleanup()

    # What operations use -----------------------------------------------------------------------------------------

    # What operations use -----------------------------------------------------------------------------------------

    def rule_of(self, name: str) -> str:
        """The rule that a parameter of this name and shape has."""
        return self.ours.opt.spec.rule_for(name if self.case.named else "", tuple(self.ours.of(name).shape))

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.ours, self.theirs

    @property
    def names(self) -> list[str]:
        """Of the parameters that the optimizer has."""
        return [name for group in self.ours.names() for name in group]

    def pick(self, r: Random, test: Callable[[str], bool] = lambda name: True) -> str:
        found = [name for name in self.names if test(name)]
        if not found:
            raise Skip
        return r.choice(found)

    def stepped(self, name: str) -> bool:
        return bool(self.ours.opt.state.get(self.ours.of(name)))

    def draw(self, r: Random, names: list[str] | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        """Gradients of all parameters: multiples of 1/16 under 4, so that 16 bits hold sums of three."""
        g = torch.Generator().manual_seed(r.randrange(2**31))
        return {
            name: (torch.randn(self.theirs.of(name).shape, generator=g) * 16).round().clamp(-63, 63) / 16 * scale
            for name in (self.names if names is None else names)
        }

    def both(self, do: Callable[[Side], Any], may_refuse: str = "") -> bool:
        """Do it to ours and, unless ours refuses in these words, to the twin."""
        before = self.fingerprint() if may_refuse else None
        try:
            do(self.ours)
        except REFUSALS as error:
            if not may_refuse or not any(word in str(error) for word in may_refuse.split("|")):
                raise Difference(f"refused: {type(error).__name__}: {error}") from error
            self.unchanged(before, f"refused, and changed: {error}")
            return False
        with kernels_off():
            do(self.theirs)
        return True

    def refused(self, do: Callable[[], Any], words: str = "") -> None:
        """``do`` must raise one sentence and change nothing."""
        before = self.fingerprint()
        try:
            do()
        except REFUSALS as error:
            text = str(error)
            if len(text) < 12 or (words and not any(word in text for word in words.split("|"))):
                raise Difference(f"refused, in other words: {type(error).__name__}: {text}") from error
            self.unchanged(before, f"refused, and changed: {text}")
            return
        raise Difference("not refused")

    def advance(self, do: Callable[[Side], Any], r: Random, may_refuse: str = "", steps: int = 1) -> bool:
        """Both step; the way gone is measured, and gradients are forgotten."""
        before = {name: p.detach().clone() for name, p in self.theirs.model.named_parameters()}
        done = self.both(do, may_refuse)
        self._gone(before, steps)
        self.edited = self.edited and not done
        for side in self.sides:
            side.opt.zero_grad()
            side.model.zero_grad()
        return done

    def _gone(self, before: Mapping[str, Tensor], steps: int) -> None:
        unit = max(ROUNDING[m] for m in self.masters) * 2.0**-8
        for name, old in before.items():
            new = self.theirs.of(name).detach()
            if closeness.group_decays(self, name):
                self.decayed.add(name)
            if new.numel():
                self.way[name] += float((new - old).abs().max())
                if self.ours.of(name).dtype in LOW:
                    self.rounded[name] += steps * unit * float(new.abs().max())

    def step(self, r: Random, do: Callable[[Side], Any] | None = None, gradients: Any = None) -> None:
        """A step on gradients that were put there by hand, now and then held against the plain path."""
        g = self.draw(r) if gradients is None else gradients
        expected = reference.step(self, g) if r.random() < 0.35 and self.released is None else None

        def stepping(side: Side) -> None:
            side.gradients(g)
            (do or Side.step)(side)

        self.advance(stepping, r)
        if expected is not None:
            reference.compare(self, expected)

    # What must be true -------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """Everything of ours that an operation might change."""
        opt = self.ours.opt
        opt.synchronize()
        list(opt.params.entries())  # names in the groups are put right when somebody looks
        found: dict[str, Any] = {"skipped": opt.skipped_steps, "spec": str(opt.spec), "seed": opt.seed}
        for name, p in self.ours.model.named_parameters():
            found[name] = (id(p), p.requires_grad, p.detach().clone())
            for key, value in opt.state.get(p, {}).items():
                found[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
        for i, group in enumerate(opt.param_groups):
            found[f"group {i}"] = [id(p) for p in group["params"]]
            found.update({f"group {i}.{k}": copy.deepcopy(v) for k, v in group.items() if k not in NAMES})
        return found

    def unchanged(self, before: Any, what: str) -> None:
        after = self.fingerprint()
        different = [k for k in before if not same(before[k], after.get(k)) and not self._without_meaning(k)]
        # What a state lacked (a master, after a cast) may be there now, at zero.
        different += [
            k for k in after.keys() - before.keys() if not isinstance(after[k], Tensor) or bool(after[k].any())
        ]
        if different:
            raise Difference(f"{what}; changed: {', '.join(different[:5])}")

    def _without_meaning(self, key: str) -> bool:
        """A master beside a weight that a cast has made wide: the next look at the state drops it."""
        name, _, moment = key.partition(".")
        return moment in BESIDE and self.ours.of(name).dtype not in LOW

    def check(self) -> None:
        """Ours is the twin, within what its formats allow."""
        if self.ours.names() != self.theirs.names():
            raise Difference(f"groups: {self.ours.names()}, the twin's {self.theirs.names()}")
        for mine, other in zip(self.ours.opt.param_groups, self.theirs.opt.param_groups, strict=True):
            for key in ("lr", "weight_decay"):
                if abs(float(mine[key]) - float(other[key])) > 1e-9:
                    raise Difference(f"{key} is {mine[key]}, the twin's {other[key]}")
        for name, q in self.theirs.model.named_parameters():
            wrong = closeness.difference(self, name, self.ours.of(name).detach(), q.detach())
            if wrong:
                raise Difference(wrong)
        for name in self.names:
            mine, other = (s.opt.state.get(s.of(name), {}).get("step") for s in self.sides)
            if mine is not None and other is not None and float(mine) != float(other):
                raise Difference(f"{name} has stepped {float(mine)} times, the twin {float(other)}")

    def lost_master(self, *names: str) -> None:
        """What stood beside these weights is gone: the next step begins at their rounding."""
        for name in names or self.names:
            q = self.theirs.of(name).detach()
            if self.ours.of(name).dtype in LOW and q.numel():
                self.rounded[name] += 2.0**-8 * float(q.abs().max())

    def replaced(self, model: Bag, opt: Any, copied: bool = False) -> None:
        """Another pair of model and optimizer goes on for ours; hooks, schedulers and watches were the old one's."""
        self.detach()
        self.ours.opt.close()
        self.ours = Side(model, opt, True)
        if copied:
            return  # with all that stood in the optimizer, as torch.optim's copies
        inside = {id(p) for group in self.theirs.opt.param_groups for p in group["params"]}
        for p in [p for p in self.theirs.opt.state if id(p) not in inside]:
            del self.theirs.opt.state[p]  # the state of a parameter in no group does not travel

    def detach(self) -> None:
        """No scheduler, no release and no watch."""
        if self.released is not None:
            self.released.remove()
        if self.watch is not None:
            self.watch.close()
        self.released = self.watch = None
        for side in self.sides:
            side.scheduler = None
            side.opt.__dict__.pop("step", None)  # torch's schedulers put a counter there
            for group in side.opt.param_groups:
                group.pop("initial_lr", None)

    def current_moments(self) -> None:
        """Skip where a moment is there that the hyperparameters of now do not keep: it need not travel."""
        opt = self.ours.opt
        for name, p, group in opt.params.entries():
            wanted = {line.key for line in opt.store.lines(name, p, group)}
            if opt.state.get(p) and opt.state[p].keys() != wanted:
                raise Skip

    def plain_groups(self) -> bool:
        """Whether all state is of parameters in groups."""
        inside = {id(p) for side in self.sides for group in side.opt.param_groups for p in group["params"]}
        return all(id(p) in inside for side in self.sides for p in side.opt.state)
