"""What a process holds on a card before a tensor is there, by the card's generation: the CUDA context and workspaces.

The driver's context holds its own structures and the kernels that were loaded. Since CUDA 11.7 and torch 1.13 kernels
are loaded when they first run (torch sets CUDA_MODULE_LOADING=LAZY); before, all of torch's were, over a GiB.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

from estimators.hardware import generation

MIB = 2**20


class Context(NamedTuple):
    """Bytes: at least, expected, at most; ``source`` says who measured it on what, or that nobody did."""

    low: int
    expected: int
    high: int
    source: str


def _mib(low: int, expected: int, high: int, source: str) -> Context:
    return Context(low * MIB, expected * MIB, high * MIB, source)


#: generation -> its context under lazy loading. Where nobody is known to have measured one: what torch's maintainers
#: name, with wide bounds.
_ANY = _mib(140, 400, 900, "about 400 MiB: pytorch/pytorch issue 109888; no measurement of this card is known")
CONTEXTS = {
    "turing": _mib(130, 141, 180, "Tesla T4, torch 2.10 to 2.14, 140.9 MiB: benchmarks/measured/t4_lora.csv"),
    "ampere": _mib(200, 256, 450, "RTX 3090, torch 2.7 with CUDA 12.8, 256 MiB: invoke-ai/InvokeAI issue 9413"),
    "ada": _mib(300, 426, 650, "RTX 6000 Ada, torch 2.10 with CUDA 13.0, 426 MiB: unslothai/unsloth-zoo pull 1053"),
}
#: Before torch 1.13 or CUDA 11.7.
EAGER = {"volta": _mib(1000, 1343, 1400, "V100: transformers' perf_train_gpu_one; Titan V, 1,006: pytorch issue 28394")}
_ANY_EAGER = _mib(650, 1000, 1400, "as Volta's, 1,006 to 1,343 MiB; no measurement of this card is known")


def context(card: str = "", eager: bool = False) -> Context:
    """``card``: its name, or empty or a size where that is not known. ``eager``: all of torch's kernels are loaded with
    it, as before torch 1.13.

    >>> context("t4").expected // MIB, context("h100").expected // MIB, context("v100-16gb", eager=True).expected // MIB
    (141, 400, 1343)
    """
    if eager:
        return EAGER.get(generation(card), _ANY_EAGER)
    return CONTEXTS.get(generation(card), _ANY)


def workspace(card: str = "") -> int:
    """Bytes of one of cuBLAS's workspaces, which torch allocates for each thread that multiplies: 2 x 4096 and 8 x 16
    KiB, on Hopper 32 MiB, on AMD's MI300 128 MiB and before 32 (ATen/cuda/CublasHandlePool.cpp).

    >>> workspace("t4"), workspace("h100") // MIB
    (8519680, 32)
    """
    kind = generation(card)
    if kind in ("hopper", "cdna2"):
        return 32 * MIB
    return 128 * MIB if kind == "cdna3" else (2 * 4096 + 8 * 16) * 1024
