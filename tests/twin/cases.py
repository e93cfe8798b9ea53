"""What the optimizer of a sequence is: a value on every axis, hyperparameters, shapes, and how far from its twin it may
be."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import torch

import memopt
from memopt.rules import RULES
from tests.twin import mixed

#: The rules that torch.optim has, and keywords that memopt's have besides.
TORCH: dict[str, tuple[Any, tuple[str, ...]]] = {
    "adamw": (torch.optim.AdamW, ()),
    "adam": (torch.optim.Adam, ()),
    "sgd": (torch.optim.SGD, ()),
    "rmsprop": (torch.optim.RMSprop, ()),
    "radam": (torch.optim.RAdam, ()),
    "adafactor": (
        torch.optim.Adafactor,
        ("beta1", "convention", "scale_parameter", "relative_step", "warmup_init"),
    ),
}
#: Hyperparameters to draw from, besides rate and decay.
HYPER: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}, {"amsgrad": True}, {"betas": (0.8, 0.95)}, {"maximize": True}],
    "adam": [{}, {"amsgrad": True}, {"betas": (0.0, 0.9)}],
    "sgd": [{"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.9, "dampening": 0.2}, {}],
    "rmsprop": [{}, {"momentum": 0.9}, {"centered": True, "momentum": 0.5}],
    "radam": [{}, {"decoupled_weight_decay": True}],
    "adafactor": [{"convention": "torch"}],
    "lookahead(adamw)": [{"lookahead_steps": 2}, {}],
    "lookahead(sgd)": [{"lookahead_steps": 3, "momentum": 0.9}],
    "ademamix": [{}, {"t_alpha": 5, "t_beta3": 5}],
}
#: Of parameters: codes need 4,096 elements and rows of 64; others stay in 32 bits. Each is there in some sequences.
SHAPES = [(64, 64), (66, 67), (7, 5), (4100,), (33,), (), (3, 24, 65), (0, 7), (9, 8, 3, 3), (1, 4200)]
#: How far weights may be from the twin's in each format: in parts of the way that the twin's weights have gone. Weights
#: in 32 bits are not compared so, but within RTOL. In 8 bits an element whose second moment is seven orders under the
#: largest of its block, below the smallest code, hardly moves: it may be the whole way off. One gradient of a 3 x 3
#: kernel is far from a product of rows and columns: steps of 8.6 times the twin's were seen.
BOUND = {"32bit": 0.0, "bf16": 0.05, "8bit": 1.0, "fp8": 1.5, "4bit": 3.0, "factored": 10.0}
#: The same for weights that are rounded: units of 2^-8 of the largest weight, for each step.
ROUNDING = {"none": 1.0, "stochastic": 2.0, "kahan": 2.0**-5, "split": 2.0**-5, "fp32": 2.0**-12, "split16": 2.0**-12}
#: fp32 arithmetic in another order, relative to the largest element or the way gone.
RTOL = 1e-6
#: Weights that are rounded.
LOW = (torch.bfloat16, torch.float16)
#: Elements of a tensor that a rounding may turn the other way.
TIES = 3


class Case(NamedTuple):
    """``bus``: memory of the CPU counts as a device's, so that ``@host``, ``@cpu`` and ``@disk`` stream. ``rules`` are
    the hyperparameters of rules that are not the spec's own."""

    spec: str
    hyper: dict[str, Any]
    options: dict[str, Any]
    overrides: dict[str, str]
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    groups: int
    nonfinite: str
    named: bool
    bus: bool
    rules: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        given = {**self.hyper, **self.options, "overrides": self.overrides, "rules": self.rules}
        shown = {k: v for k, v in given.items() if v}
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec} {shown} {dtype} x{len(self.shapes)} in {self.groups} groups{' bus' * self.bus}"


def draw_case(seed: int, only: str | None = None) -> Case:
    """A case; ``only`` is a spec that it has whatever the seed."""
    r = Random(seed)
    rule = r.choice([*ALL_RULES, "adamw", "adamw", "adam", "sgd", "rmsprop", "adafactor"])
    fmt = r.choice(["32bit", "32bit", "32bit", "bf16", "8bit", "8bit", "fp8", "4bit", "factored"])
    placement = r.choice(["device", "device", "host", "cpu", "disk", "paged"])
    master = r.choice(["none", "none", "none", "fp32", "kahan", "stochastic", "split", "split16"])
    partition = r.choice(["", "", "", "/zero1"])
    text = only or f"{rule}-{fmt}{'' if master == 'none' else '+' + master}@{placement}{partition}"
    hyper = dict(r.choice(HYPER.get(rule if only is None else memopt.parse(text).rule, [{}])))
    hyper["lr"] = r.choice([1e-3, 1e-2])
    hyper["weight_decay"] = r.choice([0.0, 0.0, 0.1])
    try:
        spec = memopt.parse(text, hyper=hyper)
        spec.resolve()
    except memopt.SpecError:  # a rule that this format does not hold, with these
        hyper = {k: hyper[k] for k in ("lr", "weight_decay")}
        spec = memopt.parse(text.replace(f"-{fmt}", "-32bit"), hyper=hyper)
    none = {(0, 7)} if spec.rule == "adafactor" else set()  # torch's divides by the number of elements
    shapes = tuple(r.sample([s for s in SHAPES if s not in none], r.randint(2, 4)))
    wide = torch.float64 if spec.placement == "device" and r.random() < 0.03 else torch.float32
    low = r.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    dtype = low if spec.master != "none" or r.random() < 0.1 else wide
    options, overrides, rules = _options(r, spec), _overrides(r, spec), {}
    if spec.is_mixed:
        shapes = (*shapes, (33,), (64, 64))
        overrides, rules = mixed.draw_overrides(r, spec)
        spec = spec.replace(hyper={**spec.hyper, **mixed.draw_hyper(r)})
    return Case(
        str(spec),
        dict(spec.hyper),
        options,
        overrides,
        dtype,
        shapes,
        r.randint(1, min(3, len(shapes))),
        r.choice(["skip", "skip", "skip", "raise", "propagate"]),
        r.random() < 0.8,
        spec.placement in ("host", "cpu", "disk") and r.random() < 0.5,
        rules,
    )


def _overrides(r: Random, spec: Any) -> dict[str, str]:
    if r.random() >= 0.1 or "sgd" in spec.rule:
        return {}
    given = r.choice(["8bit", "@host", "32bit"])
    return {"w0": "32bit" if given == "8bit" and spec.hyper.get("centered") else given}  # 8 bits do not hold both


def _options(r: Random, spec: Any) -> dict[str, Any]:
    """What the placement is told; ``directory`` is True where there is to be one."""
    found: dict[str, Any] = {}
    if spec.placement in ("host", "cpu", "disk") and r.random() < 0.5:
        found["workspace"] = "1MiB"
    if spec.placement == "disk" and r.random() < 0.4:
        found["directory"] = True
    if spec.placement == "paged" and r.random() < 0.3:
        found["resident"] = "1MiB"
    if spec.placement == "cpu" and spec.partition == "none":
        found["offload_gradients"] = r.choice([True, False, "early"])
    return found


#: One rule for all parameters: several are in tests/twin/mixed.py. A step of what is found over all parameters
#: (prodigy) is another where one is added or frozen.
_ALONE = {spec.rule for spec in memopt.specs() if not spec.fallback and not RULES[spec.rule].reports}
ALL_RULES = [*sorted(_ALONE), "lookahead(adamw)", "lookahead(sgd)"]
