"""What an optimizer is at this moment: its spec, what the spec names, and how it treats a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, final

from memopt.core.hyperparameters import SpecError
from memopt.core.integrity import Integrity
from memopt.engines import ENGINES, Engine
from memopt.partitions import PARTITIONS, Partition
from memopt.placements.gradients.checks import POLICIES
from memopt.placements.stores.by_placement import PlacementStores
from memopt.rules import RULES, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec


#: What ``load_state_dict`` does with the state of another spec or tool.
ON_MISMATCH = ("convert", "refuse")


class Releasing(Protocol):
    """Gradient release, as far as a step and the store know of it."""

    def follow(self) -> None: ...  # take the gradients of all parameters there are now
    def covers(self, p: Tensor) -> bool: ...
    def give_up(self) -> None: ...  # the step has failed
    def end_step(self, counted: bool = False) -> None: ...  # the step ends
    def remove(self) -> None: ...
    def explain(self) -> str: ...


@final
class Setup:
    """Shared by the collaborators of one optimizer. ``convert_`` puts another spec here with what it names, and where
    DeepSpeed has taken the parameters another partition.

    Raises SpecError for a value that is not allowed, and ImportError for an engine that is not installed.
    """

    spec: OptimSpec
    rule: Rule
    engine: Engine
    partition: Partition
    placement_stores: PlacementStores
    #: A conversion that was stopped where the parameters done and the others are of two rules; its ``str`` says so.
    unfinished: Any

    def __init__(
        self,
        spec: OptimSpec,
        *,
        nonfinite: str = "skip",
        seed: int = 0,
        capturable: bool = False,
        process_group: Any = None,
        on_mismatch: str = "convert",
    ) -> None:
        if on_mismatch not in ON_MISMATCH:
            raise SpecError(f"on_mismatch={on_mismatch!r} is not allowed; it must be one of {', '.join(ON_MISMATCH)}")
        if nonfinite not in POLICIES:
            raise SpecError(f"nonfinite={nonfinite!r} is not allowed; it must be one of {', '.join(POLICIES)}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise SpecError(f"seed={seed!r} is not allowed; it must be an integer")
        if not isinstance(capturable, bool):
            raise SpecError(f"capturable={capturable!r} is not allowed; it must be True or False")
        if capturable and spec.engine != "native":
            raise SpecError(f"capturable=True is not allowed with engine={spec.engine!r}; the engine for it is native")
        if capturable and spec.placements - {"device", "paged"}:
            raise SpecError(f"capturable=True is not allowed with '{spec}': a CUDA graph cannot stream state")
        if capturable and spec.is_mixed:
            raise SpecError(f"capturable=True is not allowed with '{spec}': a CUDA graph steps parameters of one rule")
        self.spec, self.nonfinite, self.seed, self.capturable = spec, nonfinite, seed, capturable
        self.process_group, self.on_mismatch = process_group, on_mismatch
        self.integrity = Integrity()
        self.rule = RULES[spec.rule]
        self.engine = ENGINES[spec.engine]
        self.engine.require()
        self.partition = PARTITIONS[spec.partition](process_group)
        self.placement_stores = PlacementStores(spec, self.partition.rank, self.partition.world_size)
        self.release: Releasing | None = None
        self.unfinished = None

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that steps the parameters of a group."""
        return RULES[self.spec.rule_of(group)]

    def check_whole(self) -> None:
        """Raise RuntimeError where a change of the state was interrupted, so that nobody takes it for whole."""
        self.integrity.check()
        if self.unfinished is not None:
            raise RuntimeError(str(self.unfinished))
