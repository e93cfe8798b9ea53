"""The bitsandbytes engine: its kernels and its code book on our axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from memopt.core import extras
from memopt.core.ledger import Line
from memopt.core.rows import Rows
from memopt.engines.base import Engine
from memopt.formats import FORMATS, Format
from memopt.formats.foreign.bitsandbytes import dynamic8
from memopt.rules import RULES, Moment

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.partitions import Partition
    from memopt.spec import OptimSpec

#: rule -> the name of bitsandbytes' kernel. Its ``adam`` decouples weight decay: it is our ``adamw``.
KERNELS = {"adamw": "adam", "adam": "adam", "lion": "lion", "rmsprop": "rmsprop", "sgd": "momentum"}
#: Hyperparameters for which the kernels have no place, and the only value that they execute.
FIXED: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": False},
    "adam": {"amsgrad": False, "weight_decay": 0.0},
    "rmsprop": {"centered": False, "momentum": 0.0},
    "sgd": {"nesterov": False, "dampening": 0.0},
}
#: The one moment with the unsigned code book: rules with a single moment use the signed one, whatever its sign.
SECOND_MOMENT = "exp_avg_sq"
#: Elements of a block of the flattened tensor.
BLOCK = 256
#: Its kernels take the number of elements as a C int.
MAX_NUMEL = 2**31 - 1


def require() -> Any:
    """bitsandbytes, or an ImportError that says how to install it."""
    extras.require("bitsandbytes.functional", "engine='bitsandbytes'")
    return extras.require("bitsandbytes", "engine='bitsandbytes'")


@final
class BitsAndBytes(Engine):
    """bitsandbytes' 8-bit (dynamic code book, blocks of 256, round to nearest) and 32-bit kernels.

    State keys are ours (``exp_avg.codes`` is its ``state1``, ``exp_avg.scales`` its ``absmax1``); the two code books,
    1 KiB each, are shared by all parameters. Quirks kept: 8-bit from 4096 elements on; ``weight_decay`` after the
    update in 8 bits on CUDA; second moments are rounded to nearest and freeze at b2 = 0.999 when gradients shrink
    (``docs/formats.md``; all of them in ``docs/gpu.md``). Not its quirk here: non-finite gradients follow memopt's
    policy on every device.
    """

    name = "bitsandbytes"
    summary = "bitsandbytes' kernels: adamw, adam, lion, rmsprop, sgd in 32 and 8 bits"

    def refuse(self, spec: OptimSpec) -> str | None:
        if spec.rule not in KERNELS:
            return f"it has no {spec.rule}; it has {', '.join(KERNELS)}"
        if spec.format not in ("32bit", "8bit"):
            return f"it has no format {spec.format!r}; it has 32bit, 8bit"
        if spec.master != "none":
            return f"it keeps nothing beside the weights; the engine for +{spec.master} is native"
        if spec.partition != "none":
            return f"it cannot shard its state; the engine for /{spec.partition} is native"
        elsewhere = sorted(spec.placements - {"device", "paged"})
        if elsewhere:
            return f"its kernels step state where it lies; the engine for @{elsewhere[0]} is native"
        return None

    def refuse_hyper(self, spec: OptimSpec, h: Mapping[str, Any]) -> str | None:
        for key in RULES[spec.rule].modifiers(h):
            return f"{key}={h[key]!r} is not allowed; its kernels do not know it"
        for key, only in FIXED.get(spec.rule, {}).items():
            if h[key] != only:
                return f"{key}={h[key]!r} is not allowed; its kernel has {key}={only!r} only"
        return None

    def require(self) -> None:
        require()

    def refuse_rows(self, rows: Rows) -> str | None:
        if rows.numel <= MAX_NUMEL:
            return None
        return (
            f"has {rows.numel:,} elements, and bitsandbytes counts them in 32 bits (at most {MAX_NUMEL:,}); the engine "
            "for it is native"
        )

    def code_of(self, moment: Moment, asked: str) -> tuple[Moment, Format]:
        if asked != "8bit":
            return moment, FORMATS[asked]
        return moment._replace(signed=moment.name != SECOND_MOMENT), dynamic8(BLOCK)

    def shared_lines(self, lines: Sequence[Line]) -> list[Line]:
        books: dict[str, str] = {}
        for line in lines:
            if line.part == "codes":
                second = line.moment == SECOND_MOMENT
                books["udynamic" if second else "dynamic"] = line.location
        return [
            Line("(all)", "code_book", book, "float32", (256,), 1024, where, "shared") for book, where in books.items()
        ]

    def step(self, works: Sequence[Work], partition: Partition, seed: int) -> None:
        with _in_order({work.p.device for work in works}):
            for work in works:
                if work.p.numel():
                    self._step(work)

    def _step(self, work: Work) -> None:
        functional, h = require().functional, work.h
        rule, moments = work.layout.rule, [m.moment for m in work.layout.moments]
        kernel = KERNELS[rule.name]
        grad = work.g.neg() if h["maximize"] else work.g
        if not moments:  # sgd without momentum keeps nothing, and has no kernel
            rule.update(work.p, grad, _NO_STATE, work.step, h)
            return
        first, second = (*(m.name for m in moments), None)[:2]
        state1, state2 = _tensors(work, first), _tensors(work, second)
        beta1, beta2 = _betas(rule.name, h)
        common = {
            "weight_decay": h["weight_decay"],
            "eps": h.get("eps", 0.0),
            "step": work.step,
            "lr": float(h["lr"]),
            "beta1": beta1,
            "beta2": beta2,
        }
        # Its kernels read parameter and gradient as one dtype, the gradient's.
        dtype = _stepped_as(kernel, state1[1] is not None, work.p)
        target, grad = work.p.to(dtype).contiguous(), grad.to(dtype).contiguous()
        if state1[1] is None:
            functional.optimizer_update_32bit(kernel, grad, target, state1[0], state2=state2[0], **common)
        else:
            books = [code_book(m.signed, work.p.device) for m in moments]
            functional.optimizer_update_8bit_blockwise(
                kernel,
                grad,
                target,
                state1[0],
                state2[0],
                qmap1=books[0],
                qmap2=books[1] if second else None,
                absmax1=state1[1],
                absmax2=state2[1],
                beta3=0.0,
                alpha=0.0,
                **common,
            )
        if target is not work.p:
            work.p.copy_(target)

    def slow_path(self, layout: ParamLayout, p: Tensor, ranks: int, cut_row: bool) -> str | None:
        return None

    def explain(self) -> str:
        return f"bitsandbytes {require().__version__}, one call per parameter"


@contextmanager
def _in_order(devices: Iterable[Any]) -> Iterator[None]:
    """On CUDA its kernels go to the default stream: what the current one was given comes before, and after."""
    import torch

    streams = [(torch.cuda.current_stream(d), torch.cuda.default_stream(d)) for d in devices if d.type == "cuda"]
    others = [(current, default) for current, default in streams if current != default]
    for current, default in others:
        default.wait_stream(current)
    yield
    for current, default in others:
        current.wait_stream(default)


def _stepped_as(kernel: str, coded: bool, p: Tensor) -> Any:
    """dtype in which this parameter is stepped: on CUDA these two have no bf16 in 32 bits, which in 8 bits too are
    those of small parameters."""
    import torch

    lacking = kernel in ("momentum", "rmsprop") and not coded and p.is_cuda and p.dtype == torch.bfloat16
    return torch.float32 if lacking else p.dtype


def _tensors(work: Work, moment: str | None) -> tuple[Any, Any]:
    """``(values, None)`` in 32 bits, ``(codes, scales)`` in 8, ``(None, None)`` for a moment there is not."""
    if moment is None:
        return None, None
    if moment in work.state:
        return work.state[moment], None
    return work.state[f"{moment}.codes"], work.state[f"{moment}.scales"]


def _betas(rule: str, h: Mapping[str, Any]) -> tuple[float, float]:
    if rule == "rmsprop":
        return h["alpha"], 0.0
    if rule == "sgd":
        return h["momentum"], 0.0
    beta1, beta2 = h["betas"]
    return beta1, beta2


_BOOKS: dict[tuple[bool, Any], Any] = {}
_NO_STATE: Any = None


def code_book(signed: bool, device: Any) -> Any:
    """bitsandbytes' dynamic map, fp32 [256], one per device and process."""
    if (signed, device) not in _BOOKS:
        _BOOKS[signed, device] = require().functional.create_dynamic_map(signed=signed).to(device)
    return _BOOKS[signed, device]
