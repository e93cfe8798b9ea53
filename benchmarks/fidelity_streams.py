"""The gradients on which ``benchmarks/fidelity.py`` compares formats: of a matrix of ROWS by COLS, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.text import Corpus, load_text

ROWS, COLS, STEPS = 64, 256, 1000
Stream = Iterator[Tensor]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def noise() -> Stream:
    """Independent normal numbers."""
    g = generator()
    while True:
        yield torch.randn(ROWS, COLS, generator=g)


def tails() -> Stream:
    """Student's t with 2 degrees of freedom."""
    torch.manual_seed(0)
    t = torch.distributions.StudentT(torch.tensor(2.0))
    while True:
        yield t.sample((ROWS, COLS))


def bursts() -> Stream:
    """Every hundredth step is a hundred times as large."""
    for step, x in enumerate(noise()):
        yield x * (100.0 if step % 100 == 50 else 1.0)


def rare_rows() -> Stream:
    """A row has a gradient once in fifty steps, as that of an embedding."""
    g = generator()
    for x in noise():
        yield x * (torch.rand(ROWS, 1, generator=g) < 0.02)


def _columns(low: float, high: float) -> Callable[[], Stream]:
    def stream() -> Stream:
        order = torch.randperm(COLS, generator=generator())
        scale = torch.logspace(low, high, COLS)[order]
        for x in noise():
            yield x * scale

    return stream


def drop() -> Stream:
    """Three quarters of each block become a hundred times smaller, where a second moment may stay behind."""
    drops = torch.rand(ROWS, COLS, generator=generator()).argsort(1) < COLS * 3 // 4
    for step, x in enumerate(noise()):
        yield torch.where(drops & (step >= STEPS // 4), 0.01 * x, x)


def pattern() -> Stream:
    """Sizes that are independent of row and column: no matrix of rank one has them."""
    size = torch.exp(torch.randn(ROWS, COLS, generator=generator()))
    for x in noise():
        yield x * size


def period(length: int) -> Callable[[], Stream]:
    """One step in so many has a gradient, of each element another one."""

    def stream() -> Stream:
        phase = torch.randint(length, (ROWS, COLS), generator=generator())
        for step, x in enumerate(noise()):
            yield torch.where(phase == step % length, 8.0, 0.05) * x.sign()

    return stream


def _language_model(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Stream]:
    """A weight of the language model of ``memopt train`` while AdamW trains it."""

    def stream() -> Stream:
        torch.manual_seed(0)
        config = ModelConfig(context=64, width=COLS, layers=2, heads=4)
        model = LanguageModel(config).to(dtype)
        corpus = Corpus(load_text(), config.context)
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
        weight = dict(model.named_parameters())[name]
        step = 0
        while True:
            opt.zero_grad()
            model(corpus.batch(0, step, 4)).backward()
            assert weight.grad is not None
            yield weight.grad[:ROWS].float()
            opt.step()
            step += 1

    return stream


STREAMS: dict[str, Callable[[], Stream]] = {
    "noise": noise,
    "tails": tails,
    "bursts": bursts,
    "rare rows": rare_rows,
    "spread of 100": _columns(-2, 0),
    "spread of 1e12": _columns(-8, 4),
    "drop": drop,
    "pattern": pattern,
    **{f"period {n}": period(n) for n in (13, 88, 89, 90)},
    "language model": _language_model("blocks.1.up.weight"),
    "its embedding": _language_model("embedding.weight"),
    "it in bf16": _language_model("blocks.1.up.weight", torch.bfloat16),
}
