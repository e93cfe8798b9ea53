"""The one boundary: what is held against a layout before an address or a buffer leaves Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: What helps where state is not that of its parameter.
REMEDY = (
    "opt.state.pop(parameter) begins it anew, memopt.load and opt.load_state_dict load another, and opt.convert_ goes "
    "to another spec"
)


class StatePlacement(Protocol):
    """A placement, as far as a layout knows of it."""

    keeps_on_host: Any
    steps_on_host: Any

    def location(self, device: str) -> str: ...


class Expected(NamedTuple):
    """What a layout expects: torch's dtype of the parameter, the shape of its rows here, and key, dtype and shape of
    each tensor of its state but the step. ``whose`` says whose state this is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[tuple[str, torch.dtype, torch.Size]]
    place: StatePlacement
    whose: str

    def check(self, p: Tensor, grad: Tensor, cut: bool) -> None:
        """Raise RuntimeError for rows of a parameter or a gradient that are not these; ``cut``: some elements of
        them."""
        if p.dtype is not self.dtype or (not cut and p.shape != self.shape):
            raise RuntimeError(
                f"{self.name}: the parameter is {_described(p)}, and {_name(self.dtype)} {list(self.shape)} was to be "
                "stepped: something has changed it within this step; nothing was stepped"
            )
        if grad.shape != p.shape:
            raise RuntimeError(
                f"{self.name}: its gradient is {_described(grad)}, and the parameter is {_described(p)}: call "
                "zero_grad() and backward() again after a parameter has changed its shape; nothing was stepped"
            )
        if grad.device != p.device and not (self.place.steps_on_host and grad.is_cpu):
            raise RuntimeError(
                f"{self.name}: its gradient is on {grad.device}, and the parameter on {p.device}: call zero_grad() "
                "and backward() again after a parameter has moved; nothing was stepped"
            )

    def misfit(self, p: Tensor, state: Mapping[str, Any]) -> str | None:
        """The sentence for a state that is not of the layout, or None."""
        on_host, device = self.place.keeps_on_host, p.device
        for key, dtype, shape in self.parts:
            x = state.get(key)
            if (
                x is None
                or getattr(x, "dtype", None) is not dtype
                or x.shape != shape
                or not x.is_contiguous()
                or (not x.is_cpu if on_host else x.device != device)
            ):
                where = " in host memory" if on_host else f" on {p.device}"
                return self._sentence(p, key, state, f"{_name(dtype)} {list(shape)}{where}")
        counter: Any = state.get("step")
        if str(getattr(counter, "dtype", "")) != "torch.float32" or counter.numel() != 1:
            return self._sentence(p, "step", state, "float32 []")
        return None

    def _sentence(self, p: Tensor, key: str, state: Mapping[str, Any], expected: str) -> str:
        there = f"is {_described(state[key])}" if key in state else "is not there"
        return (
            f"{self.name} is {_name(p.dtype)} {list(p.shape)} here, for which {self.whose} keeps {key!r} as "
            f"{expected}, and in its state that {there}; nothing was stepped. {REMEDY}"
        )


def _described(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return f"{x!r}" if isinstance(x, (int, float)) else f"a {type(x).__name__}"
    strided = "" if x.is_contiguous() else ", not contiguous"
    return f"{_name(x.dtype)} {list(x.shape)} on {x.device}{strided}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
