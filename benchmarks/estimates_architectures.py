"""Every type that transformers can build: whether it is priced exactly, and whether its activations are known.

    python benchmarks/estimates_architectures.py [--minutes 10] [--refused | --steps | --families | --table]

Each type's default configuration is priced and compared, parameter for parameter, with the module that transformers
builds on the meta device; then, in the order of a draw, one step of each is traced. ``--steps`` draws types by a seed
(the CRC-32 of the version of transformers), shrinks their configurations until a CPU can run them, and lays a traced
step beside a real one, with and without checkpointing. Types run in a worker process, one after the other, each for at
most a minute of the processor's time (three of ``--steps``); what is done is in
``benchmarks/results/estimates_architectures.json``, so that a run goes on where the last one ended, and one that was
killed loses a minute. Some types need Pillow, SciPy, timm and torchvision to be built; which were there is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from estimates_architectures_steps import NEEDED, default, fewer, stepped, tokens
from estimates_architectures_table import BATCH, DOCUMENT, documented, table
from estimates_families import families
from provenance import write_result

OUT = Path(__file__).parent / "results" / "estimates_architectures.json"
#: Seconds of the processor's time for one type, by what is done; of the clock, for all.
LIMIT, PATIENCE = {"price": 60, "trace": 60, "steps": 180}, 3600
#: Seconds after which what is done is written.
EVERY = 60
DRAWN = 80
#: Run as well as those drawn, where a small one can be built.
ALWAYS = (
    *("gemma3", "llava", "qwen2_vl", "idefics3", "paligemma", "internvl", "smolvlm", "mistral3", "blip-2", "git"),
    *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "recurrent_gemma", "rwkv", "qwen3_next"),
    *("vit", "swin", "dinov2", "convnext", "beit", "deit", "clip", "siglip", "wav2vec2", "hubert", "vit_mae"),
)


class Late(BaseException):
    """A type's time is over. No Exception, so that nothing which looks for another way goes on."""


def kinds() -> list[str]:
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def priced(kind: str) -> dict[str, Any]:
    """Parameters as estimated, and as the module on the meta device has them."""
    import torch

    from estimators.errors import InputError
    from estimators.models.from_config import from_config
    from estimators.traced.build import class_of, configuration, made_of, quiet, reason

    row: dict[str, Any] = {"type": kind, **({"given": NEEDED[kind]} if kind in NEEDED else {})}
    with quiet():
        try:
            cfg = configuration(default(kind), kind)
            cls = class_of(cfg, kind)
            with torch.device("meta"):
                module = made_of(cls, cfg, torch.bfloat16)
            row |= {"class": cls.__name__, "parameters": sum(p.numel() for p in module.parameters())}
            built = {name: tuple(p.shape) for name, p in module.named_parameters()}
            del module
        except Exception as error:
            built, row["transformers"] = {}, reason(error)
        try:
            model = from_config(cfg.to_dict() if built else default(kind), kind)
            row |= {"priced": sum(prod(shape) for _, shape in model.shapes)}
            row["exact"] = bool(built) and dict(model.shapes) == built
        except InputError as error:
            row["refused"] = str(error)
    return row


def traced(kind: str) -> dict[str, Any]:
    """What one step saves, or why that is not known: of the default configuration with a few layers, where transformers
    builds that, else of all of them. Whether a step can be traced does not depend on how many follow each other. In
    bf16, or in fp32 where the model's own code does not run in bf16."""
    from estimators.errors import InputError
    from estimators.memory.step_rows import run
    from estimators.models.from_config import from_config
    from estimators.traced.build import configuration, quiet
    from estimators.training import Training

    row: dict[str, Any] = {"type": kind}
    with quiet():
        try:
            whole = configuration(default(kind), kind).to_dict()
        except InputError as error:
            return {**row, "refused": str(error)}
        few = fewer(whole)
        for values in (few, whole) if few != whole else (whole,):
            for dtype in ("bfloat16", "float32"):
                try:
                    model = from_config(values, kind)
                    weights = {name: dtype for name, _ in model.shapes}
                    asked = Training(batch=BATCH, seq=tokens(values))
                    ran, why = run(model._replace(dtypes=weights) if dtype == "float32" else model, asked)
                except InputError as error:
                    ran, why = None, str(error)
                if ran is not None:
                    row.pop("refused", None)
                    row |= {"saved": ran.saved, "layers": "few" if values is few else "all", "weights": dtype}
                    return {**row, "notes": [*ran.notes]}
                row.setdefault("refused", why)
                if not any(
                    word in why for word in ("scalar type", "dtype", "Float")
                ):  # it is not for bf16 that it fails
                    break
    return row


DO = {"price": lambda kind: [priced(kind)], "trace": lambda kind: [traced(kind)], "steps": stepped}


def operators() -> None:
    """PyPI's torchvision is built for CUDA. Beside a CPU's torch its operators do not load, and it is not imported
    because it gives shapes to two of them. What is traced needs no more of those than that they are declared."""
    import torch

    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = f"torchvision::{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(schema.partition("(")[0], schema.removeprefix(f"torchvision::{name}"))


def worker(what: str) -> None:
    """Types on standard input, a line of JSON for each on standard output."""

    def late(*_: Any) -> None:
        raise Late

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGPROF, late)
    operators()
    for line in sys.stdin:
        kind, start = line.strip(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LIMIT[what])
        try:
            rows = DO[what](kind)
        except Late:
            why = f"no answer in {LIMIT[what]} s of the processor's time"
            rows = [{"type": kind, "refused": why, "not_run": why}]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        rows[-1]["seconds"] = round(time.process_time() - start, 1)
        print(json.dumps(rows), file=out, flush=True)


class Worker:
    """A process that does one type after the other, and is started again after one that it did not survive."""

    def __init__(self, what: str) -> None:
        self.command = [sys.executable, __file__, "--worker", what]
        self.process: subprocess.Popen[str] | None = None

    def do(self, kind: str) -> list[dict[str, Any]]:
        import selectors

        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(kind + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as wait:
            wait.register(process.stdout, selectors.EVENT_READ)
            answered = wait.select(PATIENCE)
        line = process.stdout.readline() if answered else ""
        if line:
            return list(json.loads(line))
        code = f", exit code {process.wait()}" if answered else ""
        process.kill()
        self.process = None
        what = f"the process ended{code}" if answered else f"no answer in {PATIENCE} s"
        return [{"type": kind, "refused": what, "not_run": what}]


class Done:
    """What is done, in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.written = time.monotonic()

    def types(self) -> dict[str, dict[str, Any]]:
        return {row["type"]: row for row in self.found.get("types", [])}

    def write(self, now: bool = False, **parts: Any) -> None:
        self.found |= parts
        if now or time.monotonic() - self.written > EVERY:
            self.written = time.monotonic()
            write_result(self.path, self.found, flat=True)
            self.path.with_suffix(".md").write_text(table(self.found))
            if self.path == OUT and self.found.get("types"):
                whole = json.loads(self.path.read_text())
                DOCUMENT.write_text(documented(DOCUMENT.read_text(), whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--families", action="store_true", help="traced steps beside the formulas")
    parser.add_argument("--refused", action="store_true", help="look at what was refused again")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="the JSON to go on from and to write, with a table beside"
    )
    parser.add_argument("--worker", choices=DO, help="a process of this one's")
    parser.add_argument("--table", action="store_true", help="write the tables of what is there, and stop")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    done, ended = Done(args.out), time.monotonic() + 60 * args.minutes
    if args.families:
        return done.write(now=True, families=families())
    if args.table:
        return done.write(now=True)
    every, seed = kinds(), zlib.crc32(version("transformers").encode())
    drawn = random.Random(seed).sample(every, len(every))
    done.found |= {"seed": seed, "known": len(every), "drawn": drawn}
    if args.steps:
        rows, one = done.found.get("steps", []), Worker("steps")
        there = {row["type"] for row in rows}
        for kind in dict.fromkeys([*ALWAYS, *drawn]):
            if time.monotonic() > ended or _run(rows, drawn) >= DRAWN:
                break
            if kind in every and kind not in there:
                rows += one.do(kind)
                print(rows[-1], flush=True)
                done.write(steps=rows)
        return done.write(now=True)
    types = done.types()
    if args.refused:
        types = {kind: row for kind, row in types.items() if "refused" not in row}
    for what, missing in (("price", "priced"), ("trace", "saved")):
        one = Worker(what)
        for kind in drawn:
            if time.monotonic() > ended:
                break
            row = types.get(kind, {})
            if missing in row or "refused" in row:
                continue
            types[kind] = {**row, **one.do(kind)[0]}
            print(types[kind], flush=True)
            done.write(types=list(types.values()))
    return done.write(now=True)


def _run(rows: list[dict[str, Any]], drawn: list[str]) -> int:
    """How many of the types that were drawn, in their order, were run."""
    return len({r["type"] for r in rows if "saved_nbytes" in r} & set(drawn) - set(ALWAYS))


if __name__ == "__main__":
    main()
