"""Every type that transformers can build: whether it is priced exactly, and whether its activations are known.

    python benchmarks/estimates_architectures.py [--minutes 10] [--steps]

Each type's default configuration is priced and compared, parameter for parameter, with the module that transformers
builds on the meta device; then one step is traced. ``--steps`` draws types by a seed (the CRC-32 of the version of
transformers), shrinks their configurations until a CPU can run them, and lays a traced step beside a real one, with and
without checkpointing. Types run in worker processes, one after the other; what is done is in
``benchmarks/results/estimates_architectures.json``, so that a run goes on where the last one ended. Some types need
Pillow and SciPy to be built.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from estimates_architectures_table import BATCH, SEQ, table
from estimates_families import families
from provenance import write_result

OUT = Path(__file__).parent / "results" / "estimates_architectures.json"
#: Seconds for one type, and elements of a model that a real step is run of.
LIMIT, MOST = 120, 120_000_000
DRAWN = 80
#: Run as well as those drawn, where a small one can be built.
ALWAYS = (
    *("gemma3", "llava", "qwen2_vl", "idefics3", "paligemma", "internvl", "smolvlm", "mistral3", "blip-2", "git"),
    *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "recurrent_gemma", "rwkv", "qwen3_next"),
    *("vit", "swin", "dinov2", "convnext", "beit", "deit", "clip", "siglip", "wav2vec2", "hubert", "vit_mae"),
)


def kinds() -> list[str]:
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def priced(kind: str) -> dict[str, Any]:
    """Parameters as estimated and as the module on the meta device has them, and a traced step."""
    import torch

    from estimators.errors import InputError
    from estimators.memory.step_rows import run
    from estimators.models.from_config import from_config
    from estimators.traced.build import class_of, configuration, quiet, reason
    from estimators.training import Training

    row: dict[str, Any] = {"type": kind}
    start = time.process_time()
    with quiet():
        try:
            cfg = configuration({"model_type": kind}, kind)
            cls = class_of(cfg, kind)
            with torch.device("meta"):
                module = cls._from_config(cfg, dtype=torch.bfloat16)
                module.tie_weights()
            row |= {"class": cls.__name__, "parameters": sum(p.numel() for p in module.parameters())}
            built = {name: tuple(p.shape) for name, p in module.named_parameters()}
            del module
        except Exception as error:
            built, row["transformers"] = {}, reason(error)
        try:
            model = from_config(cfg.to_dict() if built else {"model_type": kind}, kind)
            row |= {"priced": sum(_prod(shape) for _, shape in model.shapes)}
            row["exact"] = bool(built) and dict(model.shapes) == built
            ran, why = run(model, Training(batch=BATCH, seq=SEQ))
            row |= {"saved": ran.saved, "notes": ran.notes} if ran else {"refused": why}
        except InputError as error:
            row["refused"] = str(error)
    return {**row, "seconds": round(time.process_time() - start, 1)}


def _prod(shape: tuple[int, ...]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


#: Parts of the names of fields -> the most that a small model has of it.
_SMALL = (
    (("num_hidden_layers", "num_layers", "n_layer", "_layers", "depth"), 2),
    (("vocab_size",), 1000),
    (("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "n_inner"), 512),
    (("num_experts", "num_local_experts", "n_routed_experts"), 4),
    (("image_size", "img_size"), 64),
)


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few layers, tokens and experts. Widths stay: they hang together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = shrunk(value)
        elif type(value) is int:
            for parts, most in _SMALL:
                if any(name.endswith(part) for part in parts) and value > most:
                    value = most
            if name.endswith("_token_id") and value >= 1000:
                value = 999 - zlib.crc32(name.encode()) % 500
        elif name == "layer_types":
            value = value[:2] if isinstance(value, list) else value
        found[name] = value
    return found


def stepped(kind: str) -> list[dict[str, Any]]:
    """A small model's traced step beside a real one, without checkpointing and with it."""
    import torch

    from estimators.measure import saved, traced
    from estimators.traced.build import built, class_of, configuration, quiet, reason
    from estimators.traced.inputs import Asked, inputs
    from estimators.traced.source import traced as estimated
    from estimators.traced.step import arguments, loss_of, summed
    from estimators.training import Training

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with quiet():
        try:
            small = shrunk(configuration({"model_type": kind}, kind).to_dict())
            cfg = configuration(small, kind)
            cls = class_of(cfg, kind)
            module, faked = built(small, kind, cls.__name__)
            parameters = sum(p.numel() for p in module.parameters())
            if parameters > MOST:
                return [{"type": kind, "not_run": f"{parameters:,} parameters when small"}]
            ways = list(inputs(module, Asked(BATCH, SEQ, torch.bfloat16), faked))
        except Exception as error:
            return [{"type": kind, "not_run": reason(error)}]
        for how in ("none", "full"):
            row: dict[str, Any] = {"type": kind, "class": cls.__name__, "checkpointing": how, "parameters": parameters}
            try:
                from estimators.traced.from_transformers import from_transformers

                model = from_transformers(small, kind)
                ran, why = estimated(model, Training(batch=BATCH, seq=SEQ, checkpointing=how, device="cpu"))
                if ran is None:
                    rows.append({**row, "not_run": why})
                    continue
                torch.manual_seed(0)
                real = cls._from_config(configuration(small, kind), dtype=torch.bfloat16).train()
                for one in (real.config, *(getattr(real.config, n, None) for n in real.config.sub_configs)):
                    if getattr(one, "use_cache", None):
                        one.use_cache = False
                if how == "full":
                    real.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
                row |= _real(real, ways, arguments, loss_of, summed, saved, traced)
            except Exception as error:
                rows.append({**row, "not_run": reason(error)})
                continue
            weights = sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
            peak = max(ran.forward.activations, ran.loss.activations, sum(ran.backward))
            row |= {
                "saved_predicted": ran.saved,
                "saved_error": round(ran.saved / max(1, row["saved_nbytes"]) - 1, 5),
                "peak_predicted": weights + peak,
                "peak_nbytes": weights + row["moving_nbytes"],
                "peak_error": round((weights + peak) / (weights + row["moving_nbytes"]) - 1, 5),
                "moving_error": round(peak / row["moving_nbytes"] - 1, 5),
                "notes": list(ran.notes),
            }
            rows.append(row)
            del real
    return rows


def _real(module: Any, ways: Any, arguments: Any, loss_of: Any, summed: Any, saved: Any, traced: Any) -> dict[str, Any]:
    """Saved bytes and the peak of a real step, with the first inputs that it takes."""
    import torch
    from torch.utils._pytree import tree_map_only

    def real(t: torch.Tensor) -> torch.Tensor:
        return torch.rand(t.shape).to(t.dtype) if t.is_meta else t

    error: Exception = ValueError("no inputs")
    for given, _ in ways:
        args, kwargs = arguments(tree_map_only(torch.Tensor, real, given))
        box: dict[str, Any] = {}

        def run(args: Any = args, kwargs: Any = kwargs) -> Any:
            out = module(*args, **kwargs)
            loss = loss_of(out)
            return summed(out) if loss is None else loss

        def forward(run: Any = run, box: Any = box) -> None:
            box["loss"] = run()

        def backward(box: Any = box) -> None:
            box.pop("loss").backward()

        try:
            forward(), backward(), module.zero_grad()
        except Exception as one:
            error = one
            continue
        kept = saved(module, run).nbytes
        curve = traced(("forward", forward), ("backward", backward))
        return {"saved_nbytes": kept, "moving_nbytes": curve.peak}
    raise error


def worker(steps: bool) -> None:
    """Types on standard input, a line of JSON for each on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        kind = line.strip()
        rows = stepped(kind) if steps else [priced(kind)]
        print(json.dumps(rows), file=out, flush=True)


class Worker:
    """A process that does one type after the other, and is started again after one that it did not survive."""

    def __init__(self, steps: bool) -> None:
        self.command = [sys.executable, __file__, "--worker", *(["--steps"] if steps else [])]
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
            answered = wait.select(LIMIT)
        line = process.stdout.readline() if answered else ""
        if line:
            return list(json.loads(line))
        code = "" if not answered else f", exit code {process.wait()}"
        process.kill()
        self.process = None
        what = f"no answer in {LIMIT} s" if not answered else f"the process ended{code}"
        return [{"type": kind, "refused": what, "not_run": what}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--families", action="store_true", help="traced steps beside the formulas")
    parser.add_argument("--worker", action="store_true", help="a process of this one's")
    parser.add_argument("--table", action="store_true", help="write the tables of what is there, and stop")
    args = parser.parse_args()
    if args.worker:
        return worker(args.steps)
    done = json.loads(OUT.read_text()) if OUT.is_file() else {}
    seed = zlib.crc32(version("transformers").encode())
    if args.families:
        done["families"] = families()
        args.table = True
    every = kinds()
    drawn = random.Random(seed).sample(every, len(every))
    key = "steps" if args.steps else "types"
    rows = done.get(key, [])
    there = {r["type"] for r in rows}
    ended, one = time.monotonic() + 60 * args.minutes, Worker(args.steps)
    wanted = [*ALWAYS, *drawn] if args.steps else drawn
    for kind in [] if args.table else [k for k in dict.fromkeys(wanted) if k in every and k not in there]:
        if time.monotonic() > ended or (args.steps and _run(rows, drawn) >= DRAWN):
            break
        rows += one.do(kind)
        print(rows[-1], flush=True)
    done |= {key: rows, "seed": seed, "known": len(every), "drawn": drawn}
    write_result(OUT, done, flat=True)
    OUT.with_suffix(".md").write_text(table(done))


def _run(rows: list[dict[str, Any]], drawn: list[str]) -> int:
    """How many of the types that were drawn, in their order, were run."""
    return len({r["type"] for r in rows if "saved_nbytes" in r} & set(drawn) - set(ALWAYS))


if __name__ == "__main__":
    main()
