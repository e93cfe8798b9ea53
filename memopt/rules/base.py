"""What a rule is: the moments it keeps, its hyperparameters, and one update in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from memopt.core import dither
from memopt.core.hyperparameters import Checks, SpecError, check, check_names
from memopt.core.rows import Shape

if TYPE_CHECKING:
    from torch import Tensor

Hyper = Mapping[str, Any]


class Moment(NamedTuple):
    """One running statistic. ``signed`` chooses the code, ``factorable`` says that a rank-1 form makes sense.

    ``fixed_format`` is the one that it has whatever the spec says, and ``fixed_because`` why. With ``rank`` it is not
    of the parameter but of a projection of its matrices to so many dimensions. ``begins`` says what the rule makes of
    it at the first step where that is not zero, ``mean_of`` what it stands for where another rule has another moment of
    the same name. A ``momentum`` averages a few steps only.
    """

    name: str
    signed: bool = True
    factorable: bool = False
    fixed_format: str = ""
    fixed_because: str = ""
    begins: str = ""
    mean_of: str = ""
    rank: int = 0
    momentum: bool = False

    def turn(self, step: int) -> int:
        """The t of its dither (:mod:`memopt.core.dither`) at this step."""
        return step if self.momentum else dither.shuffled(step, dither.SHUFFLED_MOMENT)


#: What every rule can be told besides its own hyperparameters, and its default.
MODIFIERS = {"cautious": False}
#: The least share of the elements by which a cautious update is scaled up, as timm has it.
LEAST_SHARE = 1e-3

#: The two moments of the Adam family.
EXP_AVG = Moment("exp_avg", momentum=True)
EXP_AVG_SQ = Moment("exp_avg_sq", signed=False, factorable=True)


class State(Protocol):
    """What an update may ask of a parameter's state. It does not know the format, the placement or the ranks.

    ``write`` returns what this step may see of the value: the value itself for element-wise formats (an update uses
    its moments *before* they are re-quantised), the rank-1 reconstruction for a factored one. ``floor`` bounds from
    below the mean by which a factored reconstruction divides. ``orthogonal`` is what Newton-Schulz iteration makes of
    the whole matrix of which ``x`` are the rows here, in a dtype of its own. ``column_sums`` of ``x`` [matrices, rows
    here, columns] are [matrices, 1, columns] in fp64, over all rows of each matrix wherever they are, and so are
    ``left_product``'s [matrices, k, columns], of a matrix A [k, rows] and ``x``, where ``columns(first, stop)`` makes
    columns of A. ``key`` is what this parameter draws random numbers from. ``report`` adds numbers, fp64 [], to those
    that are summed over all parameters of the rule. ``rank_one`` says whether ``write`` returns such a reconstruction:
    a second moment that does not know the elements.
    """

    def read(self, name: str) -> Tensor: ...
    def write(self, name: str, value: Tensor, floor: float = 0.0) -> Tensor: ...
    def rank_one(self, name: str) -> bool: ...
    def rms(self, x: Tensor) -> Tensor: ...
    def report(self, numbers: Sequence[Tensor]) -> None: ...
    def orthogonal(self, x: Tensor) -> Tensor: ...
    def column_sums(self, x: Tensor) -> Tensor: ...
    def left_product(self, columns: Callable[[int, int], Tensor], x: Tensor) -> Tensor: ...

    @property
    def shape(self) -> Shape: ...  # of the whole parameter
    @property
    def key(self) -> int: ...


#: update(p, g, state, t, h): ``p`` [rows, …] fp32 or fp64, changed in place; ``g`` like p, not changed;
#: ``t`` the number of this step, from 1; ``h`` the group's hyperparameters.
Update = Callable[["Tensor", "Tensor", State, int, Hyper], None]


class Rule(NamedTuple):
    """A value on the rule axis.

    ``defaults`` are the hyperparameters and their defaults; ``presets`` change them by the value of one of them.
    ``moments(h, shape)`` are what the rule keeps; of the hyperparameters it may look at those in ``moments_by``, and
    whether they are None, 0 or False is all that counts, and at those in ``sizes_by``, whose values decide how large
    they are. ``refuse(h, format)`` gives a reason why this format cannot hold them, or None. ``element_wise`` is False
    for rules that need statistics of the whole tensor.

    ``decoupled(h)``: whether weight decay multiplies the parameter instead of joining the gradient. ``example`` are
    hyperparameters with which a rule that may do without state keeps some.
    ``rate_factor`` is what a rate that is good for AdamW is multiplied by to be good here, about.
    ``kernel_fields(h)`` are the numbers and flags that its kernel takes beside those which all take
    (:data:`memopt.kernels.abi.HYPER`). ``declines(name, shape, kind)`` says why a rule of matrices does not take a
    parameter, or None where it does (``kind`` as of :mod:`memopt.core.param_kinds`), and ``fallback`` names the rule of
    those; a rule without it takes everything. ``companions`` are the rules that step embeddings or heads beside this
    one, by kind, and ``part_of`` names the rule of which one is a companion: it is no choice of its own. ``in_torch``
    names hyperparameters, on or off, that kernels do not know beside :data:`MODIFIERS`: a parameter for which one is on
    goes the plain path. ``whole_matrices``: its update asks for them (``State.orthogonal``), so that ranks put them
    together. ``checks`` say what hyperparameters of its own may be: name -> (what is allowed, test), as
    :data:`memopt.core.hyperparameters.CHECKS` does of those that several rules have.

    ``reports`` is how many numbers an update reports (``State.report``); ``after_step(groups, sums)`` is called with
    all param groups of the rule and their sums over parameters and ranks, at the end of a step. ``estimate(h)`` is what
    the rule has found that ``lr`` is multiplied by.

    ``wrapper`` and ``inner`` are the two names in ``lookahead(adamw)``; of a plain rule there is no wrapper, and
    ``inner`` is its own name.
    """

    name: str
    summary: str
    source: str
    defaults: dict[str, Any]
    moments: Callable[[Hyper, Shape], tuple[Moment, ...]]
    update: Update
    default_format: str = "32bit"
    element_wise: bool = True
    presets: Callable[[Hyper], dict[str, Any]] = lambda given: {}
    refuse: Callable[[Hyper, str], str | None] = lambda h, fmt: None
    moments_by: tuple[str, ...] = ()
    sizes_by: tuple[str, ...] = ()
    decoupled: Callable[[Hyper], bool] = lambda h: False
    example: Mapping[str, Any] = MappingProxyType({})
    kernel_fields: Callable[[Hyper], dict[str, float]] = lambda h: {}
    wrapper: str = ""
    wrapped: str = ""
    declines: Callable[[str, Shape, str], str | None] | None = None
    fallback: str = ""
    companions: Mapping[str, str] = MappingProxyType({})
    part_of: str = ""
    whole_matrices: bool = False
    checks: Checks = MappingProxyType({})
    reports: int = 0
    after_step: Callable[[Sequence[MutableMapping[str, Any]], Sequence[float]], None] | None = None
    estimate: Callable[[Hyper], float] | None = None
    rate_factor: float = 1.0
    in_torch: tuple[str, ...] = ()

    def about_rate(self, lr: Any, before: Rule | None = None) -> str | None:
        """One sentence where ``lr`` is plainly a rate of AdamW's, or stays from a rule ``before`` whose rates are of
        another size; None where it may be meant."""
        factor = self.rate_factor / (before.rate_factor if before is not None else 1.0)
        if lr is None or 1 / 3 < factor < 3:
            return None
        rate = float(lr)
        if before is None and not (1e-6 <= rate <= 2e-3 if factor > 1 else rate >= 5e-4):
            return None
        times = f"about {factor:.0f} times larger" if factor > 1 else f"about {1 / factor:.0f} times smaller"
        return f"lr is {rate:g}; rates of {self.name} are {times} than those of {before.name if before else 'adamw'}"

    @property
    def inner(self) -> str:
        return self.wrapped or self.name

    def modifiers(self, h: Hyper) -> tuple[str, ...]:
        """What is on of the hyperparameters that no kernel knows."""
        return tuple(name for name in (*MODIFIERS, *self.in_torch) if h.get(name))

    def step(self, p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
        """:attr:`update`, and with ``cautious`` of it only what goes against the gradient::

            s <- what the update adds to p, but for decoupled weight decay
            p <- p + s * (s * g < 0) / max(share of the elements with s * g < 0, 1e-3)

        Source: Liang et al., "Cautious optimizers: improving training with one line of code", 2024; the floor of the
        share is timm's. No state.
        """
        if not h.get("cautious") or self.wrapper:  # a wrapper steps the rule within it
            self.update(p, g, state, t, h)
            return
        before = p.clone()
        self.update(p, g, state, t, h)
        if self.decoupled(h):
            before.mul_(1 - float(h["lr"]) * h["weight_decay"])
        step = p.sub(before)
        agrees = (step * g < 0).to(p.dtype)
        share = state.rms(agrees).square_().clamp_(min=LEAST_SHARE)
        p.copy_(before.add_(step.mul_(agrees).div_(share)))

    def dormant(self, h: Hyper, keys: Iterable[str]) -> set[str]:
        """Of a state with these keys the moments that are switched off in ``h``."""
        active = {m.name for m in self.moments(h, (2, 2))}
        on = {**h, **dict.fromkeys(self.moments_by, 0.5)}
        return {key.partition(".")[0] for key in keys} & {m.name for m in self.moments(on, (2, 2))} - active

    def keeping(self, h: Hyper, keys: Iterable[str]) -> Hyper:
        """``h`` with what has been switched off since, and of which a state with these keys still has the moments,
        switched on: they are kept until it is switched on again."""
        names = {key.partition(".")[0] for key in keys}
        for switch in self.moments_by:
            if not h[switch] and names:
                on = {**h, switch: 0.5}
                if names & ({m.name for m in self.moments(on, (2, 2))} - {m.name for m in self.moments(h, (2, 2))}):
                    h = on
        return h

    def moments_key(self, h: Hyper) -> tuple[Any, ...]:
        """All of ``h`` that :attr:`moments` depends on."""
        switches = (None if h[name] is None else bool(h[name]) for name in self.moments_by)
        return (*switches, *(h[name] for name in self.sizes_by))

    def moments_of(self, key: tuple[Any, ...], shape: Shape) -> tuple[Moment, ...]:
        """The moments for such a key."""
        return self.moments(dict(zip((*self.moments_by, *self.sizes_by), key, strict=True)), shape)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter with its default; all rules have ``maximize`` and :data:`MODIFIERS`."""
        return {**self.defaults, "maximize": False, **MODIFIERS}

    def resolve(self, given: Hyper) -> dict[str, Any]:
        """The full set of hyperparameters: defaults, then presets, then what was given. Raises :class:`SpecError`."""
        check_names(self.name, given, self.hyperparameters)
        h = {**self.hyperparameters, **self.presets(given), **given}
        self.check(h)
        return h

    def check(self, h: Hyper) -> None:
        """Raise :class:`SpecError` for values that are not allowed; keys that are not ours are a scheduler's."""
        check(self.name, {k: h[k] for k in self.hyperparameters}, self.checks)
        for name in ("betas", "eps"):
            if name in self.hyperparameters and _count(h[name]) != _count(self.hyperparameters[name]):
                count = _count(self.hyperparameters[name])
                shape = f"{count} numbers" if count else "one number"
                default = self.hyperparameters[name]
                raise SpecError(f"{self.name}: {name}={h[name]!r} is not allowed; it is {shape}, by default {default}")
        if h.get("cautious") and self.reports:
            raise SpecError(f"{self.name}: cautious=True is not allowed; it follows its own steps, all of each")
        if h.get("cautious") and h.get("convention") == "transformers" and h["weight_decay"]:
            raise SpecError(
                f"{self.name}: cautious=True with weight_decay={h['weight_decay']!r} is not allowed in the convention "
                "of transformers, whose decay follows a rate that the rule makes; take convention='absolute'"
            )
        if h["lr"] is None and not h.get("relative_step"):
            raise SpecError(f"{self.name}: lr=None is not allowed; lr must be a finite number >= 0")


def _count(value: Any) -> int:
    """Length of a tuple or list, 0 for a single number."""
    return len(value) if isinstance(value, (tuple, list)) else 0
