"""State in copies and pickles of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memopt.optim.state_store import StateStore


class _Bytes(NamedTuple):
    """A tensor of torch's 8-bit floats, which pickle cannot carry: its bytes travel instead."""

    dtype: torch.dtype
    values: Tensor


def packed_bytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """What pickle can carry of a parameter's state."""
    return {
        key: _Bytes(x.dtype, x.view(torch.uint8))
        if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize == 1
        else x
        for key, x in state.items()
    }


def unpacked_bytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`packed_bytes`."""
    return {key: x.values.view(x.dtype) if isinstance(x, _Bytes) else x for key, x in state.items()}


def restore_copied(store: StateStore, copied: dict[Any, Any]) -> None:
    """Put the state of a pickle or a copy, which is ordinary memory, back where the placement says."""
    copied = {p: unpacked_bytes(x) if isinstance(x, dict) else x for p, x in copied.items()}
    for one in store.params.resolved():
        parts = copied.pop(one.p, None)
        if parts:
            target = store.allocate(one, fresh=True)
            for key, value in parts.items():
                if key in target:
                    target[key].copy_(value)
                else:
                    target[key] = value
    store.state.update(copied)
    store.register_params()
    store.flush()
