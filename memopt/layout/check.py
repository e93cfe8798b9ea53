"""The one boundary: what is held against the layout before an address or a buffer leaves Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout

#: What helps where state is not that of its parameter.
REMEDY = (
    "opt.append_rows and opt.select_rows change its rows, opt.state.pop(parameter) begins it anew, memopt.load and "
    "opt.load_state_dict load another, and opt.convert_ goes to another spec"
)


def check(layout: ParamLayout, p: Tensor, grad: Tensor, cut: bool) -> None:
    """Raise RuntimeError for rows of a parameter or a gradient that are not of the layout."""
    if p.dtype is not layout.expected()[0] or (not cut and p.shape != layout.rows.local_shape):
        raise RuntimeError(
            f"{layout.name}: the parameter is {_described(p)}, and {layout.dtype} {list(layout.rows.local_shape)} was "
            "to be stepped: something has changed it within this step; nothing was stepped"
        )
    if grad.shape != p.shape:
        raise RuntimeError(
            f"{layout.name}: its gradient is {_described(grad)}, and the parameter is {_described(p)}: call "
            "zero_grad() and backward() again after a parameter has changed its shape; nothing was stepped"
        )
    if grad.device != p.device and not (layout.placement.steps_on_host and grad.is_cpu):
        raise RuntimeError(
            f"{layout.name}: its gradient is on {grad.device}, and the parameter on {p.device}: call zero_grad() and "
            "backward() again after a parameter has moved; nothing was stepped"
        )


def misfit(layout: ParamLayout, p: Tensor, state: Mapping[str, Any]) -> str | None:
    """The sentence for a state that is not of the layout, or None."""
    on_host, device = layout.placement.keeps_on_host, p.device
    for key, dtype, shape in layout.expected()[1]:
        x = state.get(key)
        if (
            x is None
            or getattr(x, "dtype", None) is not dtype
            or x.shape != shape
            or not x.is_contiguous()
            or (not x.is_cpu if on_host else x.device != device)
        ):
            return _sentence(layout, p, key, state, f"{layout.tensors[key].dtype} {list(shape)}", on_host)
    counter: Any = state.get("step")
    if getattr(counter, "dtype", None) is not _fp32() or counter.numel() != 1:
        return _sentence(layout, p, "step", state, "float32 []", True)
    return None


def _sentence(layout: ParamLayout, p: Tensor, key: str, state: Mapping[str, Any], expected: str, on_host: bool) -> str:
    where = "" if key == "step" else " in host memory" if on_host else f" on {p.device}"
    there = f"is {_described(state[key])}" if key in state else "is not there"
    return (
        f"{layout.name} is {_name(p)} {list(p.shape)} here, for which {layout.rule.name} in {layout.asked} keeps "
        f"{key!r} as {expected}{where}, and in its state that {there}; nothing was stepped. {REMEDY}"
    )


def _described(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return f"{x!r}" if isinstance(x, (int, float)) else f"a {type(x).__name__}"
    strided = "" if x.is_contiguous() else ", not contiguous"
    return f"{_name(x)} {list(x.shape)} on {x.device}{strided}"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _fp32() -> Any:
    import torch

    return torch.float32
