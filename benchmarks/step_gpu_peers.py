"""The libraries around us, as candidates of step_gpu.py: a name, and how it is built or why it is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

import memopt

Step = Callable[[], Any]
Build = Callable[[list[torch.nn.Parameter]], Step]


def others() -> Iterator[tuple[str, Build | str]]:
    """torchao last, because it compiles for a while."""
    yield "torch AdamW fused", lambda p: torch.optim.AdamW(p, fused=True).step
    yield "torch AdamW foreach", lambda p: torch.optim.AdamW(p, foreach=True).step
    yield "torch Adafactor foreach", lambda p: torch.optim.Adafactor(p, foreach=True).step
    yield from _of("bitsandbytes", "bitsandbytes.optim", "AdamW32bit", "AdamW8bit", "Lion8bit")
    yield "memopt adamw-8bit, engine bitsandbytes", _our_engine
    yield from _of("flashoptim", "flashoptim", "FlashAdamW")
    yield from _of("torchao", "torchao.optim", "AdamW8bit", "AdamW4bit")


def _our_engine(params: list[torch.nn.Parameter]) -> Step:
    return memopt.create(params, "adamw-8bit", engine="bitsandbytes", nonfinite="propagate").step


def _of(label: str, module: str, *names: str) -> Iterator[tuple[str, Build | str]]:
    try:
        found = import_module(module)
    except Exception as error:  # whatever a library's import may raise on this machine
        yield from ((f"{label} {name}", said(error)) for name in names)
        return
    for name in names:
        yield f"{label} {name}", lambda p, name=name: getattr(found, name)(p).step


def said(error: BaseException) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"left out: {type(error).__name__}: {text[:160]}"
