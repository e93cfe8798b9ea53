"""One step of a module on fake tensors: forward and backward, recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from estimators.activations.recorded import BACKWARD, END, LOSS
from estimators.traced.as_real import as_if_real
from estimators.traced.recorder import Recorder, leaves
from estimators.traced.segments import Segments
from estimators.traced.values import Untraceable, Values


class Faked:
    """A module's fake mode, and the values that it knows."""

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.values = Values(self.fake)

    @contextmanager
    def on(self, recorder: Recorder | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(as_if_real())
            stack.enter_context(self.fake)
            stack.enter_context(recorder or self.values)
            yield

    def like(self, t: torch.Tensor) -> torch.Tensor:
        """A fake tensor in place of a real one or one on the meta device."""
        if isinstance(t, FakeTensor) and t.fake_mode is self.fake and t.device.type == "cpu":
            return t
        return self.values.faked(t.detach().to("meta") if isinstance(t, FakeTensor) else t.detach())


def fake_weights(
    module: torch.nn.Module, faked: Faked, dtype: torch.dtype | None = None
) -> list[tuple[dict[str, Any], str, Any]]:
    """Puts a fake tensor of the same shape in the place of every parameter and buffer, shared ones shared, and returns
    what was where. ``dtype``: of floating-point parameters and buffers, where not their own."""
    memo: dict[int, torch.Tensor] = {}

    def fake(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in memo:
            if type(t) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) and not isinstance(t, torch.nn.Buffer):
                raise Untraceable(f"weights of the class {type(t).__name__} are not traced")
            made = faked.like(t)
            if dtype is not None and made.is_floating_point() and made.dtype is not dtype:
                with faked.fake:
                    made = torch.empty_strided(made.size(), made.stride(), dtype=dtype)
            if isinstance(t, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=t.requires_grad)
            memo[id(t)] = made
        return memo[id(t)]

    tables: list[dict[str, Any]] = [t for one in module.modules() for t in (one._parameters, one._buffers)]
    before = [(table, name, t) for table in tables for name, t in table.items() if t is not None]
    made = [fake(t) for _, _, t in before]
    for (table, name, _), t in zip(before, made, strict=True):
        table[name] = t
    return before


@contextmanager
def weights_faked(module: torch.nn.Module, faked: Faked, dtype: torch.dtype | None = None) -> Iterator[None]:
    """:func:`fake_weights` until the end."""
    before = fake_weights(module, faked, dtype)
    try:
        yield
    finally:
        for table, name, t in before:
            table[name] = t


@contextmanager
def training(module: torch.nn.Module) -> Iterator[None]:
    """In training mode; every module's own mode comes back."""
    before = [(one, one.training) for one in module.modules()]
    module.train()
    try:
        yield
    finally:
        for one, mode in before:
            one.training = mode


def loss_of(out: Any) -> torch.Tensor | None:
    """What a model says is its loss: an output named so, or a scalar."""
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if found is None:
        first = out[0] if isinstance(out, (list, tuple)) and out else out
        found = first if isinstance(first, torch.Tensor) and first.dim() == 0 else None
    if not isinstance(found, torch.Tensor) or not found.requires_grad:
        return None
    return found if found.dim() == 0 else found.sum()


def summed(out: Any) -> torch.Tensor | None:
    """The sum of the first output that has a gradient."""
    for t in leaves(out):
        if t.requires_grad and t.is_floating_point():
            return t.float().sum() if t.dtype is not torch.float32 else t.sum()
    return None


class TracedRun:
    """A recorded step: its segments and what is to be said about it."""

    def __init__(self, segments: Segments, notes: tuple[str, ...]) -> None:
        self.segments = segments
        self.notes = notes


def run(
    module: torch.nn.Module,
    given: Any,
    faked: Faked,
    stacks: Callable[[torch.nn.Module], list[list[torch.nn.Module]]] = lambda module: [],
    head: torch.nn.Module | None = None,
    mixed: torch.dtype | None = None,
) -> TracedRun:
    """``module`` has fake parameters. ``given``: a mapping (keywords), a tuple or list (arguments) or one argument.
    ``stacks``: layers whose passes are told apart. ``head``: where the phase of the loss begins. ``mixed``:
    torch.autocast's dtype."""
    recorder = Recorder(faked.values)
    args, kwargs = arguments(tree_map_only(torch.Tensor, faked.like, given))
    recorder.known([*module.parameters(), *module.buffers()])
    recorder.given(leaves((args, kwargs)))
    segments = Segments(recorder)
    notes: list[str] = []
    autocast = torch.autocast("cpu", mixed) if mixed is not None else nullcontext()
    hooks = [p.register_post_accumulate_grad_hook(recorder.gradient) for p in module.parameters() if p.requires_grad]
    hooks += segments.watch(stacks(module))
    if head is not None:
        hooks.append(head.register_forward_pre_hook(lambda *_: segments.phase(LOSS)))
    try:
        with faked.on(recorder):
            with autocast:
                out = module(*args, **kwargs)
                loss = loss_of(out)
                if loss is None:
                    loss = summed(out)
                    notes.append("the model returns no loss: it is taken to be the sum of its output")
            if loss is None:
                raise Untraceable("the model returns nothing that has a gradient")
            recorder.outputs(out, loss)
            del out
            segments.phase(BACKWARD)
            _backward(loss)
            segments.phase(END)
            del loss
    finally:
        for hook in hooks:
            hook.remove()
        for p in module.parameters():
            p.grad = None
    return TracedRun(segments, (*notes, *faked.values.assumed))


def _backward(loss: torch.Tensor) -> None:
    """``loss.backward()``, but with torch's function modes on: a checkpointed layer that runs again must see those that
    it saw before."""
    engine: Any = torch.autograd.graph._engine_run_backward
    engine((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a call: a mapping is keywords, a tuple or list arguments, anything else the only one."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (list, tuple)) else ((given,), {})
