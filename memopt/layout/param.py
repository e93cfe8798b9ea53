"""``resolve_layout``: what a spec means for one parameter on this rank. Price, allocation, checks and steps read it.

State keys are made here and nowhere else, and here alone rows are found in the parts of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import Line, TensorSpec
from memopt.core.registry import ENGINES, PLACEMENTS, by_sign
from memopt.core.rows import Rows
from memopt.formats import ALL_FORMATS, FORMATS, Format
from memopt.formats.projected import of_projection
from memopt.layout.check import Expected, StatePlacement
from memopt.masters import Master, master_of
from memopt.partitions import PARTITIONS
from memopt.rules import RULES, Moment, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec

#: The number of steps a parameter has taken, as torch.optim keeps it: one fp32 number, in host memory unless the
#: optimizer is capturable.
STEP = TensorSpec("float32", ())


class Coding(Protocol):
    """An engine, as far as a layout knows of it."""

    def refuse_rows(self, rows: Rows) -> str | None: ...
    def code_of(self, moment: Moment, asked: str) -> tuple[Moment, Format]: ...


class MomentLayout(NamedTuple):
    """One moment of a parameter, and the format that holds it; ``fallback_reason`` says why where that is not the one
    asked for. ``keys`` are ``(part, state key)`` in the order of allocation."""

    moment: Moment
    format: Format
    fallback_reason: str
    keys: tuple[tuple[str, str], ...]

    def parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this moment: part -> tensor."""
        return {part: state[key] for part, key in self.keys}


@final
class ParamLayout:
    """``rows`` of the parameter ``name`` of ``dtype``, the ``index``-th of its optimizer: everything that decides where
    its state is, what is in it and how it is rounded, and ``modifiers`` what its rule is told that no kernel knows.
    ``asked`` is the format, or the two, that the spec names for it, ``partitioned`` whether ranks share parameters out,
    ``key`` what of the hyperparameters the moments depend on."""

    __slots__ = (
        "_coded",
        "_expected",
        "_tensors",
        "asked",
        "dtype",
        "facts",
        "index",
        "key",
        "master",
        "modifiers",
        "moments",
        "name",
        "needs_whole",
        "partitioned",
        "placement",
        "rows",
        "rule",
        "seed",
    )

    def __init__(
        self,
        name: str,
        index: int,
        rows: Rows,
        dtype: str,
        rule: Rule,
        moments: tuple[MomentLayout, ...],
        master: Master,
        placement: StatePlacement,
        seed: int = 0,
        *,
        asked: str = "32bit",
        partitioned: bool = False,
        key: tuple[Any, ...] = (),
        modifiers: tuple[str, ...] = (),
    ) -> None:
        self.name, self.index, self.rows, self.dtype = name, index, rows, dtype
        self.rule, self.moments, self.master, self.placement, self.seed = rule, moments, master, placement, seed
        self.asked, self.partitioned, self.key, self.modifiers = asked, partitioned, key, modifiers
        #: Whether a step needs all of the parameter at once: for statistics of the whole, or a format that keeps such.
        self.needs_whole = (
            not rule.element_wise or "cautious" in modifiers or any(m.format.whole_tensor for m in moments)
        )
        #: What kernels have worked out of this layout; theirs alone.
        self.facts: Any = None
        self._tensors: dict[str, TensorSpec] | None = None
        self._expected: Expected | None = None
        self._coded: frozenset[str] | None = None

    def at(self, rows: Rows) -> ParamLayout:
        """The same of other rows."""
        if rows == self.rows:
            return self
        return ParamLayout(
            self.name,
            self.index,
            rows,
            self.dtype,
            self.rule,
            self.moments,
            self.master,
            self.placement,
            self.seed,
            asked=self.asked,
            partitioned=self.partitioned,
            key=self.key,
            modifiers=self.modifiers,
        )

    @property
    def coded(self) -> frozenset[str]:
        """The names of moments that are kept in codes, under which nothing stands in a state of ours."""
        if self._coded is None:
            self._coded = frozenset(m.moment.name for m in self.moments if all(part for part, _ in m.keys))
        return self._coded

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the state but the step: key -> dtype and shape, in the order of allocation."""
        if self._tensors is None:
            found = {}
            for moment, fmt, _, keys in self.moments:
                parts = fmt.layout(moment, self.rows)
                found.update({key: parts[part] for part, key in keys})
            self._tensors = found | self.master.layout(self.rows, self.dtype)
        return self._tensors

    def lines(self, device: str, capturable: bool = False) -> list[Line]:
        """The lines of the ledger, that of the step first, for a parameter on ``device``: what is allocated and what it
        costs."""
        where = self.placement.location(device)
        lines = [Line(self.name, "step", "", STEP.dtype, STEP.shape, STEP.nbytes, device if capturable else "cpu")]
        for key, tensor in self.tensors.items():
            moment, _, part = key.partition(".")
            lines.append(Line(self.name, moment, part, tensor.dtype, tensor.shape, tensor.nbytes, where))
        return lines

    def slices(self, rows: Rows) -> dict[str, slice]:
        """Where these rows of the parameter stand along dimension 0 of each part of the state: key -> slice, of a part
        that all rows share the whole."""
        found = {}
        for moment, fmt, _, keys in self.moments:
            for part, key in keys:
                span = fmt.span(moment, part, self.rows, rows)
                found[key] = slice(None) if span is None else slice(*span)
        if self.master.layout(self.rows, self.dtype):
            begin = self.rows.bounds[0]
            found[self.master.key] = slice(*(bound - begin for bound in rows.bounds))
        return found

    @property
    def expected(self) -> Expected:
        """What parameter, gradient and state are held against."""
        if self._expected is None:
            import torch

            parts = [(key, getattr(torch, t.dtype), torch.Size(t.shape)) for key, t in self.tensors.items()]
            by = f"{self.rule.name} in {self.asked}"
            dtype, shape = getattr(torch, self.dtype), self.rows.local_shape
            self._expected = Expected(self.name, dtype, shape, parts, self.placement, by)
        return self._expected

    def check(self, p: Tensor, grad: Tensor, state: Mapping[str, Any], *, cut: bool = False) -> None:
        """Raise RuntimeError, with one sentence, unless the rows ``p`` of the parameter, their gradient and their state
        have the dtypes, sizes and devices of this layout. ``cut``: p and grad are some elements of the rows."""
        self.check_gradient(p, grad, cut=cut)
        if problem := self.misfit(p, state):
            raise RuntimeError(problem)

    def check_gradient(self, p: Tensor, grad: Tensor, *, cut: bool = False) -> None:
        """The same of the parameter and its gradient alone."""
        self.expected.check(p, grad, cut)

    def misfit(self, p: Tensor, state: Mapping[str, Any]) -> str | None:
        """The sentence for a state that is not of this layout, or None."""
        return self.expected.misfit(p, state)


@lru_cache(maxsize=4096)
def _moments(
    engine: str, rule: str, values: tuple[Any, ...], asked: str, partition: str, rows: Rows
) -> tuple[MomentLayout, ...]:
    executes: Coding = ENGINES[engine]
    keeps = RULES[rule]
    uncut = PARTITIONS[partition].declines(rows.shape) if asked != "32bit" else None
    chosen = []
    for moment in keeps.moments_of(values, rows.shape):
        if moment.fixed_format:
            fmt, reason = ALL_FORMATS[moment.fixed_format], moment.fixed_because if moment.fixed_format != asked else ""
        else:
            moment, fmt = executes.code_of(moment, by_sign(asked)[not moment.signed])
            if moment.rank:  # never cut within a row
                fmt, reason = of_projection(fmt, moment, rows.shape)
            else:
                reason = fmt.declines(moment, rows.shape) or uncut or ""
                fmt = FORMATS["32bit"] if reason else fmt
        keys = tuple((part, f"{moment.name}.{part}" if part else moment.name) for part in fmt.layout(moment, rows))
        chosen.append(MomentLayout(moment, fmt, reason, keys))
    return tuple(chosen)


def resolve_layout(
    spec: OptimSpec, h: Mapping[str, Any], name: str, index: int, rows: Rows, dtype: str, seed: int = 0
) -> ParamLayout:
    """The layout of these rows of a parameter of ``dtype`` under ``spec`` with the hyperparameters ``h``.

    Formats are chosen moment by moment, from the name and the global shape alone. Raises SpecError for a parameter
    that the engine cannot take.
    """
    rule = RULES[spec.rule_of(h)]
    return ParamLayout(
        name,
        index,
        rows,
        dtype,
        rule,
        moments_of(spec, h, name, rows),
        master_of(spec.master, dtype),
        PLACEMENTS[spec.for_parameter(name)[1]],
        seed,
        asked=spec.format_for(name, rule.name),
        partitioned=spec.partition != "none",
        key=rule.moments_key(h),
        modifiers=rule.modifiers(h),
    )


def moments_of(spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows) -> tuple[MomentLayout, ...]:
    """The moments of such a layout. Raises SpecError for a parameter that the engine cannot take."""
    engine: Coding = ENGINES[spec.engine]
    if reason := engine.refuse_rows(rows):
        raise SpecError(f"{name} {reason}")
    rule = spec.rule_of(h)
    return _moments(spec.engine, rule, RULES[rule].moments_key(h), spec.format_for(name, rule), spec.partition, rows)
