"""What a step does otherwise with real tensors than with fake ones, and on a card than on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from estimators.traced.values import value


@contextmanager
def as_if_real() -> Iterator[None]:
    """transformers takes other paths where it sees fake tensors; a fake number in a name ("expert_3") has no digits;
    distributions check values that are not known; a list of fake numbers makes no tensor; modules that a forward pass
    converts refuse fake weights."""
    library: Any = sys.modules.get("transformers.utils.import_utils")
    with ExitStack() as stack:
        if library is not None and hasattr(library, "is_fake_tensor"):
            stack.enter_context(_instead(library, "is_fake_tensor", lambda x: False))
        stack.enter_context(_instead(FakeTensor, "__format__", _format))
        stack.enter_context(_instead(torch.distributions.Distribution, "_validate_args", False))
        stack.enter_context(_instead(torch, "tensor", _made_of_numbers(torch.tensor)))
        stack.enter_context(_instead(torch.nn.Module, "_apply", _applied(torch.nn.Module._apply)))
        yield


@contextmanager
def _instead(owner: Any, name: str, new: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _format(t: torch.Tensor, spec: str) -> str:
    known = value(t) if t.dim() == 0 else None
    return object.__format__(t, spec) if known is None else format(known.item(), spec)


def _made_of_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    def plain(data: Any) -> Any:
        if isinstance(data, (list, tuple)):
            return [plain(one) for one in data]
        known = value(data) if isinstance(data, FakeTensor) and data.dim() == 0 else None
        return data if known is None else known.item()

    return lambda data, *args, **kwargs: original(plain(data), *args, **kwargs)


def _applied(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Module._apply`` which changes fake weights as it changes real ones: the parameter stays, its data are new."""

    def apply(module: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> torch.nn.Module:
        if not any(isinstance(p, FakeTensor) for p in module.parameters(recurse)):
            changed: torch.nn.Module = original(module, fn, recurse)
            return changed
        for p in module.parameters(recurse):
            with torch.no_grad():
                new = fn(p)
            if new is not p:
                p.data = new
        for one in module.modules() if recurse else [module]:
            for name, b in one._buffers.items():
                one._buffers[name] = None if b is None else fn(b)
        return module

    return apply


class OnCard(TorchFunctionMode):
    """What a card computes otherwise than a CPU: a dropout's mask is of booleans, and fused attention needs none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or not p:
        return x
    out = torch.native_dropout(x, p, True)[0]
    return x.copy_(out) if inplace else out


def _attention(
    func: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """A bias that needs a gradient is for the memory-efficient kernel, which a CPU does not have."""
    if attn_mask is None or not attn_mask.requires_grad or args or kwargs.get("enable_gqa"):
        out: torch.Tensor = func(q, k, v, attn_mask, 0.0, *args, **kwargs)
        return out
    bias = attn_mask.expand(q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    found: torch.Tensor = kernel(q, k, v, bias, True, 0.0, False, scale=kwargs.get("scale"))[0]
    return found
