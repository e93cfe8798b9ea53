"""Random command lines: none may end in a traceback or run on, whatever the terminal's encoding.

    python benchmarks/cli_fuzz.py --lines 10000 --minutes 8     # again and again, until all of them have been tried

All of it in one process: verbs that would train, time a step or serve get lines that they refuse. A line is drawn from
the seed and its number alone, so that a run goes on where the one before stopped (``results/cli_fuzz.json`` holds how
far it is) and any line can be tried again (``--only N``). Each is tried under one encoding in turn. A line that needs
more than ``LIMIT`` seconds of processor time, or ten times as long on the clock, counts as hung.
"""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENCODINGS = ("ascii", "latin-1", "utf-8")
#: Seconds of processor time for one line.
LIMIT = 20.0
#: What no reader of text or of tensors takes.
BINARY = bytes(range(256)) * 4
#: Lines between two writes of the results.
PIECE = 250

ORDINARY = "1 1 1 2 2 3 4 8 10 16 64 100 128 1000"
NUMBERS = f"{ORDINARY} 0.1 0.5 0.01 0.02 "
NUMBERS += "0 10000000000000 999999999999999999 1000000000000000000000 -1 -0.5 1e3 1e400 nan inf"
WORDS = "x é … \u2028 日本 %s {} = ' \udce9 --- 8B 0x10 ١٢ true"
#: What a calm line, which is every second one, has nothing of.
WRONG = set(f"{WORDS} no nothing int3 sawtooth maybe adamw-9bit adamw- @ = betas =1 1e30GiB -3B 0".split(" "))
WRONG.update(("EMPTY", "BINARY", "FOLDER", "MISSING", "JSON", "NOWHERE", "lr=x", "exp_avg=x", "x.txt"))
MODELS = (
    "8B 350M 1T 0 -3B 1e9 8_000_000 llama-3.1-8b gpt2 mixtral-8x7b t5-base qwen2.5-7b EMPTY BINARY FOLDER MISSING JSON"
)
SPECS = (
    "adamw adamw-8bit adamw-4bit adafactor lion-8bit sgd adamw@paged adamw@host adamw-8bit@cpu adamw@disk adamw/zero1 "
    "adamw-8bit/zero3 adamw-bf16+split lookahead(adamw)-8bit paged_adamw_8bit adamw- @ adamw-9bit"
)
DTYPES = "bf16 fp32 fp16 int3"
KINDS = "constant linear cosine cosine_restarts inverse_sqrt step wsd sawtooth"

#: Flag -> what may follow it, or "" for a switch.
STEP = {
    "--seq": NUMBERS, "--batch": NUMBERS, "--accumulate": NUMBERS, "--checkpointing": "none full selective every-2 no",
    "--attention": "sdpa flash eager no", "--loss": "full chunked fused no", "--outputs": "dropped kept no",
    "--lora": NUMBERS, "--lora-targets": "all-linear attention default q_proj nothing", "--lora-dtype": DTYPES,
    "--lora-dropout": NUMBERS, "--lora-kind": "lora rslora dora no", "--modules-to-save": "lm_head nothing",
    "--quantised": "nf4 nf4-double int8 gptq no", "--kbit-prepare": "yes no maybe", "--frozen": "embed* *",
    "--train": "*norm* nothing", "--release-gradients": "", "--mixed": DTYPES, "--offload-activations": "",
    "--offload-params": "", "--compile": "", "--float8": "", "--deepspeed": "", "--bucket": NUMBERS,
    "--hyper": "momentum=0.9 amsgrad=true lr=x betas =", "--workspace": "1GiB 0 x 1e30GiB", "--directory": "run /",
    "--offload-gradients": "false early true no", "--weights": DTYPES, "--gradients": DTYPES, "--json": "",
    "--optim": SPECS,
}  # fmt: skip
VERBS = {
    "estimate": (MODELS, STEP | {"--gpu": "24GiB rtx-4090 h100 0 x 1e30GiB", "--world": NUMBERS, "--models": "",
                 "--from": "EMPTY BINARY JSON MISSING FOLDER", "--html": "OUT FOLDER NOWHERE", "--emit":
                 "accelerate deepspeed transformers python x", "--against": "EMPTY BINARY JSON MISSING",
                 "--accept-tight": ""}),
    "plan": ("llama-3.2-1b gpt2 EMPTY BINARY x", STEP | {"--gpu": "8GiB 24GiB h100 0 x", "--gpus": NUMBERS}),
    "list": ("specs recipes x llama-2-7b", {"--aliases": "", "--json": "", "--no": ""}),
    "schedule": (KINDS, {"--warmup": NUMBERS, "--total-steps": NUMBERS, "--floor": NUMBERS, "--lr": NUMBERS,
                 "--cycle": NUMBERS, "--cycle-mult": NUMBERS, "--timescale": NUMBERS, "--hold": NUMBERS,
                 "--every": NUMBERS, "--gamma": NUMBERS, "--decay": NUMBERS, "--json": "",
                 "--plot": "NOWHERE FOLDER x.txt"}),
    "measure": ("-- python MISSING BINARY x", {"--out": "OUT FOLDER NOWHERE"}),
    "train": ("EMPTY BINARY MISSING", {"--steps": NUMBERS, "--batch": NUMBERS, "--context": NUMBERS, "--world": NUMBERS,
              "--threads": NUMBERS, "--timeout": NUMBERS, "--seed": NUMBERS, "--lr": NUMBERS, "--optim": SPECS,
              "--json": "OUT FOLDER NOWHERE"}),
    "solve": ("llama-3.2-1b gpt2 8B EMPTY BINARY x", STEP | {"--gpu": "8GiB 24GiB h100 0 x", "--world": NUMBERS,
              "--largest": "batch seq lora parameters layers-trained x", "--smallest": "gpus gpu x",
              "--accept-tight": ""}),
    "convert": ("SAVED SAVED SAVED EMPTY BINARY JSON MISSING FOLDER NEW", {"--to": "adamw-8bit torch dcp x @",
                "--from": "adamw x",
                "--engine": "native bitsandbytes x", "--fill": "x exp_avg=0 =1 exp_avg=x", "--dry-run": ""}),
    "inspect": ("SAVED EMPTY BINARY JSON MISSING FOLDER", {"--from": "adamw x", "--json": ""}),
    "web": ("", {"--port": "-1 70000 x 1e3 ١٢", "--write": "OUT FOLDER NOWHERE", "--pyodide": "FOLDER MISSING EMPTY"}),
    "completion": ("bash zsh fish x", {}),
    "lr-find": ("EMPTY BINARY MISSING", {"--from": NUMBERS, "--to": NUMBERS, "--steps": NUMBERS, "--optim": SPECS,
                "--plot": "NOWHERE FOLDER x.txt", "--json": ""}),
}  # fmt: skip
#: What most lines of a verb have, so that some of them get to the work.
USUAL = {"estimate": ["--seq", "128", "--gpu", "24GiB"], "schedule": ["--total-steps", "500"]}
USUAL |= {"convert": ["--to", "adamw-8bit"], "solve": ["--gpu", "24GiB", "--largest", "batch", "--seq", "128"]}
#: How often each verb is drawn; a plan searches over hundreds of estimates.
WEIGHTS = {"estimate": 30, "plan": 1, "solve": 1, "list": 9, "schedule": 25, "measure": 6, "train": 8, "lr-find": 8}
WEIGHTS |= {"convert": 6, "inspect": 4, "web": 2, "completion": 1}


def line(rng: random.Random, files: dict[str, str]) -> list[str]:
    """One random command line."""
    verb = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    positional, flags = VERBS[verb]
    words = [verb]
    calm = rng.random() < 0.5
    for pool in [positional] * rng.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2)):
        words += [_word(rng, pool, files, calm)] if pool else []
    if verb == "convert" and rng.random() < 0.9:
        words.append(_word(rng, positional, files, calm))
    if verb in ("train", "lr-find") and len(words) == 1:
        words.append(files["MISSING"])  # without a path the built-in text would be trained on
    if verb == "plan" and rng.random() < 0.9:
        words += ["--gpu", "24GiB"]
    if verb in USUAL and rng.random() < 0.6:
        words += USUAL[verb]
    for flag in rng.sample(list(flags), min(rng.choice((0, 0, 1, 1, 1, 2, 2, 3, 5)), len(flags))):
        words.append(flag)
        if flags[flag]:
            words.append(_word(rng, flags[flag], files, calm))
    if verb == "web" and "--port" not in words:
        words += ["--port", "70000"]  # one that is free would be served until Ctrl-C
    if rng.random() < 0.03:
        words.append("--help")
    return words


def _word(rng: random.Random, pool: str, files: dict[str, str], calm: bool) -> str:
    if calm:
        pool = " ".join(word for word in pool.split(" ") if word not in WRONG) or pool
        pool = ORDINARY if pool.startswith(ORDINARY) else pool
    elif rng.random() < 0.04:
        pool = WORDS
    word = rng.choice(pool.split(" "))
    return files.get(word, word)


def fixtures(folder: Path) -> dict[str, str]:
    """Placeholder of a pool -> a path: files that hold nothing, bytes, JSON of another kind, and places without one."""
    (folder / "empty.json").touch()
    (folder / "binary.safetensors").write_bytes(BINARY)
    (folder / "other.json").write_text('{"model_type": "nothing", "hidden_size": [1]}')
    (folder / "folder").mkdir(exist_ok=True)
    _save(folder / "saved")
    names = {"EMPTY": "empty.json", "BINARY": "binary.safetensors", "JSON": "other.json", "FOLDER": "folder"}
    names |= {"SAVED": "saved", "NEW": "new"}
    names |= {"MISSING": "missing", "OUT": "out", "NOWHERE": "no/such/folder/out.png"}
    return {name: str(folder / path) for name, path in names.items()}


def restore(files: dict[str, str]) -> None:
    """What a line before wrote where the next expects nothing: a folder of text would be trained on."""
    shutil.rmtree(files["MISSING"], ignore_errors=True)
    Path(files["MISSING"]).unlink(missing_ok=True)
    for name, content in (("EMPTY", b""), ("BINARY", BINARY)):
        shutil.rmtree(files[name], ignore_errors=True)
        Path(files[name]).write_bytes(content)


def _save(folder: Path) -> None:
    """A checkpoint of a step of a small model."""
    import torch

    import memopt

    model = torch.nn.Linear(8, 8)
    optimizer = memopt.create(model, "adamw", lr=1e-3)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    memopt.save(folder, model=model, optimizer=optimizer)


class Hung(BaseException):
    """Past every ``except Exception`` of the code that is tried."""


def attempt(words: list[str], encoding: str) -> tuple[str, str]:
    """``(outcome, traceback)``: the exit code, or what is wrong."""
    from memopt.cli import main

    def stop(number: int, frame: object) -> None:
        raise Hung

    before = sys.stdout, sys.stderr
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    clocks = {signal.SIGVTALRM: signal.ITIMER_VIRTUAL, signal.SIGALRM: signal.ITIMER_REAL}
    handlers = {number: signal.signal(number, stop) for number in clocks}
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, 10 * LIMIT)
    sys.stdout, sys.stderr = out, err
    try:
        code = main(words)
        sys.stdout.flush()
    except SystemExit as exit_:
        code = exit_.code
    except Hung:
        return "hung", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        for clock in clocks.values():
            signal.setitimer(clock, 0)
        sys.stdout, sys.stderr = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code not in (0, 1, 2):
        return f"exit code {code}", ""
    err.flush()
    said = err.buffer.getvalue()
    if code == 2 and not said.strip():
        return "exit code 2 without a sentence", ""
    return f"exit code {code}", "" if b"Traceback" not in said else said.decode(encoding)


def drawn(seed: int, number: int, files: dict[str, str]) -> tuple[list[str], str]:
    """The line of this number, and its encoding."""
    return line(random.Random(f"{seed}:{number}"), files), ENCODINGS[number % len(ENCODINGS)]


def run(first: int, last: int, seed: int) -> dict[str, object]:
    """Lines ``first`` to ``last`` (not that one) of a seed."""
    outcomes: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    failures: list[dict[str, object]] = []
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        files, here = fixtures(Path(scratch)), Path.cwd()
        os.chdir(scratch)  # a file that a line writes stays here
        try:
            for number in range(first, last):
                restore(files)
                words, encoding = drawn(seed, number, files)
                start = time.process_time()
                outcome, trace = attempt(words, encoding)
                longest = max(longest, time.process_time() - start)
                outcomes[outcome] += 1
                verbs[words[0]] += 1
                if trace or outcome not in ("exit code 0", "exit code 1", "exit code 2"):
                    shown = ascii(shlex.join(words).replace(scratch, "DIR"))
                    found = {"line": shown, "encoding": encoding, "outcome": outcome, "trace": trace[-1500:]}
                    failures.append({"number": number, **found})
        finally:
            os.chdir(here)
    return {
        "lines": last,
        "seed": seed,
        "encodings": list(ENCODINGS),
        "outcomes": dict(sorted(outcomes.items())),
        "verbs": dict(sorted(verbs.items())),
        "longest_cpu_seconds": round(longest, 2),
        "failures": failures,
    }


def together(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found up to now, and what now."""
    for name in ("outcomes", "verbs"):
        found[name] = dict(sorted((Counter(before[name]) + Counter(found[name])).items()))
    longest = max(before["longest_cpu_seconds"], found["longest_cpu_seconds"])
    return {**found, "longest_cpu_seconds": longest, "failures": before["failures"] + found["failures"]}


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after them, and go on another time")
    parser.add_argument("--only", type=int, metavar="N", help="show line N, try it, and write nothing")
    parser.add_argument("--anew", action="store_true", help="from line 0, whatever was tried before")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cli_fuzz.json")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from provenance import commit, write_result

    if args.only is not None:
        found = run(args.only, args.only + 1, args.seed)
        print(json.dumps(found, indent=2))
        return 1 if found["failures"] else 0
    found: dict[str, Any] = {}
    if args.out.exists() and not args.anew:
        before = json.loads(args.out.read_text())
        found = before if before.get("seed") == args.seed and "pieces" in before else {}
    end = time.monotonic() + 60 * args.minutes
    while (first := found.get("lines", 0)) < args.lines and time.monotonic() < end:
        more: dict[str, Any] = run(first, min(first + PIECE, args.lines), args.seed)
        pieces = [*found.get("pieces", []), {"first": first, "last": more["lines"], "commit": commit()}]
        found = {**(together(found, more) if found else more), "pieces": pieces}
        write_result(args.out, found)  # a run that is stopped goes on from here
    for failure in found["failures"][:20]:
        print(failure["number"], failure["outcome"], failure["encoding"], failure["line"], failure["trace"], sep="\n")
    print({name: found[name] for name in ("lines", "outcomes", "verbs", "longest_cpu_seconds")})
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
