"""Golden bits: hashes of what every rule × format × master makes of one awkward model in twenty steps.

``python tests/helpers/golden_bits.py`` writes ``tests/golden/*.json`` anew: only where bits are meant to change, and
the commit says why. ``kernels.json`` is of the C++ kernels in AVX2: their results depend on the instruction set in the
last bit, and on nothing else (``docs/kernels.md``). ``reference.json`` is of the reference path, whose sums are
torch's: it holds for the version and the instruction set of torch that stand in it. Parameters and gradients are
multiples of powers of two from whole random numbers, the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from memopt.checkpoint.io.contents import RANDOM
from memopt.kernels import abi, loader
from memopt.rules import RULES
from tests.helpers.cases import HYPER, VARIANTS

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = 20
ISA = "avx2"

#: Rows that are no multiple of a block, a stack, a convolution, vectors under and over the limit, a small matrix, an
#: empty tensor, a scalar, and one (``late``) that has a gradient from the second step on.
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (66, 67),
    "conv": (70, 67, 3),
    "bias": (70,),
    "small": (5, 3),
    "vector": (4097,),
    "empty": (0, 7),
    "scalar": (),
    "experts": (3, 23, 65),
    "wide": (7, 700),
    "late": (9, 513),
}

#: Placements, partitions and steps without a plan do not change bits: they are run for these.
STEMS = (
    "adamw-8bit",
    "lion-4bit",
    "sgd-bf16",
    "adafactor",
    "adammini-fp8",
    "rmsprop-factored",
    "came",
    "lookahead(adamw)-8bit",
    "adamw-8bit+split",
    "lamb-8bit+stochastic",
)

Case = tuple[str, str, dict[str, Any]]  # spec, dtype, hyperparameters


def cases() -> dict[str, Case]:
    """Every rule × format × master, the variants that keep other moments, and 16-bit weights without a master."""
    found: list[Case] = []
    for spec in memopt.specs():
        # Products of matrices are torch's, and their bits the processor's.
        plain = (spec.placement, spec.partition, spec.fallback) == ("device", "none", "")
        if plain and spec.rule in abi.RULES:  # bits of torch alone are another's with another processor
            hyper = HYPER.get(spec.rule, {})
            found.append((str(spec), "float32" if spec.master == "none" else "bfloat16", hyper))
            if spec.master == "none" and spec.format in ("32bit", "8bit", "factored"):
                found.append((str(spec), "bfloat16", hyper))
            if spec.rule == "adamw" and spec.format == "8bit":
                found.append((str(spec), "float16", hyper))
    for text, hyper in VARIANTS:
        spec = memopt.parse(text, hyper=hyper)
        if RULES[spec.rule].inner not in abi.RULES:
            continue
        found.append((str(spec.replace(placement="device", partition="none")), "float32", hyper))
    return {" ".join([s, d, *(f"{k}={v}" for k, v in h.items())]): (s, d, h) for s, d, h in found}


def model_of(dtype: str) -> nn.ParameterDict:
    g = torch.Generator().manual_seed(1)
    made = {name: nn.Parameter(_numbers(shape, g, 2.0**-11, dtype)) for name, shape in SHAPES.items()}
    return nn.ParameterDict(made)


def give_gradients(model: nn.ParameterDict, step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for name, p in model.items():
        grad = _numbers(tuple(p.shape), g, 2.0 ** -(10 + step % 5), str(p.dtype).removeprefix("torch."))
        p.grad = None if name == "late" and step == 1 else grad


def _numbers(shape: tuple[int, ...], g: torch.Generator, unit: float, dtype: str) -> Tensor:
    return (torch.randint(-1000, 1001, shape, generator=g).double() * unit).to(getattr(torch, dtype))


def run(case: Case, *, ending: str = "", planned: bool = True, save: bool = False, **options: Any) -> dict[str, str]:
    """The hashes after twenty steps; ``ending`` is a placement and a partition."""
    text, dtype, hyper = case
    model = model_of(dtype)
    opt = memopt.create(model, text + ending, **hyper, **options)
    for step in range(1, STEPS + 1):
        give_gradients(model, step)
        if not planned:  # other groups: nothing that was prepared fits
            opt.param_groups = [dict(group) for group in opt.param_groups]
        opt.step()
    found = hashes(model, opt)
    if save:
        found["checkpoint"] = _checkpoint(model, opt)
    opt.close()
    return found


def hashes(model: nn.ParameterDict, opt: memopt.Optimizer) -> dict[str, str]:
    states = ((key, opt.state[p][key]) for p in model.values() for key in sorted(opt.state.get(p, {})))
    return {"parameters": _hash((n, p.detach()) for n, p in model.items()), "state": _hash(states)}


def _hash(tensors: Any) -> str:
    found = hashlib.sha256()
    for name, x in tensors:
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _checkpoint(model: nn.Module, opt: memopt.Optimizer) -> str:
    """Of all files but what says who wrote them, and sums of what is hashed here."""
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        memopt.save(Path(folder) / "c", model=model, optimizer=opt)
        for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".json", ".safetensors")):
            found.update(path.name.encode())
            if path.name == "manifest.json":
                manifest = json.loads(path.read_text())
                kept = {k: v for k, v in manifest.items() if k not in ("written_by", "sha256", "files")}
                found.update(json.dumps(kept, sort_keys=True).encode())
            else:
                for piece in _tensors(path.read_bytes()):
                    found.update(piece)
    return found.hexdigest()[:16]


def _tensors(file: bytes) -> Iterator[bytes]:
    """Name, header and bytes of each tensor of a safetensors file but the random generators'."""
    begin = 8 + int.from_bytes(file[:8], "little")
    for name, entry in json.loads(file[8:begin]).items():
        if not name.startswith(RANDOM):
            yield json.dumps([name, entry]).encode()
            start, stop = entry.get("data_offsets", (0, 0))
            yield file[begin + start : begin + stop]


@contextmanager
def kernels(isa: str) -> Iterator[None]:
    """The kernels of one instruction set, or ``"off"``."""
    before, asked = loader._loaded, os.environ.get("MEMOPT_KERNELS")
    os.environ["MEMOPT_KERNELS"], loader._loaded = isa, None
    try:
        yield
    finally:
        loader._loaded = before
        if asked is None:
            del os.environ["MEMOPT_KERNELS"]
        else:
            os.environ["MEMOPT_KERNELS"] = asked


def reference_key() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def golden(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


#: Rules whose sums are taken in another order where a partition might cut them.
SUMMING = ("adafactor", "came", "rmsprop-factored", "lamb-8bit+stochastic")


def on_ranks() -> dict[str, dict[str, str]]:
    """In each process of a group: the stems under /zero1, on the kernels."""
    found = cases()
    with kernels(ISA):
        return {s: run(_case(found, s), ending="/zero1") for s in STEMS}


def _case(found: Mapping[str, Case], stem: str) -> Case:
    return next(case for case in found.values() if case[0] == stem)


def stems() -> dict[str, Case]:
    found = cases()
    return {key: case for key, case in found.items() if case is _case(found, case[0]) and case[0] in STEMS}


def write(name: str, header: dict[str, Any], found: Mapping[str, Any]) -> None:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    FOLDER.mkdir(exist_ok=True)
    head = json.dumps(header)[1:-1]
    (FOLDER / f"{name}.json").write_text(f'{{{head},\n "cases": {{\n{lines}\n }}}}\n')


def main() -> None:
    from tests.helpers.ranks import run as run_ranks

    torch.set_num_threads(1)
    with kernels(ISA):
        found = loader.library()
        assert found is not None, loader.missing()
        assert found.isa == ISA
        write("kernels", {"isa": ISA}, {key: run(case, save=True) for key, case in cases().items()})
    write("ranks", {"isa": ISA, "world_size": 2}, dict(zip("01", run_ranks(on_ranks, 2), strict=True)))
    with kernels("off"):
        write("reference", {"of": reference_key()}, {key: run(case) for key, case in cases().items()})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
