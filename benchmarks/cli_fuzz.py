"""Random command lines: none may end in a traceback or run on, whatever the terminal's encoding.

    python benchmarks/cli_fuzz.py --lines 10000 --seed 0

All of it in one process and without torch: verbs that would train or time a step get lines that they refuse. A line
that needs more than ``LIMIT`` seconds of processor time counts as hung. Results: ``results/cli_fuzz.json``.
"""

from __future__ import annotations

import io
import os
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENCODINGS = ("ascii", "latin-1", "utf-8")
#: Seconds of processor time for one line.
LIMIT = 20.0

#: Half of them ordinary.
NUMBERS = "1 1 1 2 2 3 4 8 10 16 64 100 128 1000 0.1 0.5 0.01 0.02 "
NUMBERS += "0 10000000000000 999999999999999999 1000000000000000000000 -1 -0.5 1e3 1e400 nan inf"
WORDS = "x é … \u2028 日本 %s {} = ' \udce9 --- 8B 0x10 ١٢ true"
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
    "lr-find": ("EMPTY BINARY MISSING", {"--from": NUMBERS, "--to": NUMBERS, "--steps": NUMBERS, "--optim": SPECS,
                "--plot": "NOWHERE FOLDER x.txt", "--json": ""}),
}  # fmt: skip
#: What most lines of a verb have, so that some of them get to the work.
USUAL = {"estimate": ["--seq", "128", "--gpu", "24GiB"], "schedule": ["--total-steps", "500"]}
#: How often each verb is drawn; a plan searches over hundreds of estimates.
WEIGHTS = {"estimate": 30, "plan": 1, "list": 10, "schedule": 30, "measure": 8, "train": 10, "lr-find": 10}


def line(rng: random.Random, files: dict[str, str]) -> list[str]:
    """One random command line."""
    verb = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    positional, flags = VERBS[verb]
    words = [verb]
    for pool in [positional] * rng.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2)):
        words.append(_word(rng, pool, files))
    if verb in ("train", "lr-find") and len(words) == 1:
        words.append(files["MISSING"])  # without a path the built-in text would be trained on
    if verb == "plan" and rng.random() < 0.9:
        words += ["--gpu", "24GiB"]
    if verb in USUAL and rng.random() < 0.6:
        words += USUAL[verb]
    for flag in rng.sample(list(flags), min(rng.choice((0, 0, 1, 1, 1, 2, 2, 3, 5)), len(flags))):
        words.append(flag)
        if flags[flag]:
            words.append(_word(rng, flags[flag], files))
    if rng.random() < 0.03:
        words.append("--help")
    return words


def _word(rng: random.Random, pool: str, files: dict[str, str]) -> str:
    word = rng.choice((WORDS if rng.random() < 0.04 else pool).split(" "))
    return files.get(word, word)


def fixtures(folder: Path) -> dict[str, str]:
    """Placeholder of a pool -> a path: files that hold nothing, bytes, JSON of another kind, and places without one."""
    (folder / "empty.json").touch()
    (folder / "binary.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "other.json").write_text('{"model_type": "nothing", "hidden_size": [1]}')
    (folder / "folder").mkdir(exist_ok=True)
    names = {"EMPTY": "empty.json", "BINARY": "binary.safetensors", "JSON": "other.json", "FOLDER": "folder"}
    names |= {"MISSING": "missing", "OUT": "out", "NOWHERE": "no/such/folder/out.png"}
    return {name: str(folder / path) for name, path in names.items()}


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
    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
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
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout, sys.stderr = before
        signal.signal(signal.SIGVTALRM, handler)
    if code not in (0, 1, 2):
        return f"exit code {code}", ""
    err.flush()
    said = err.buffer.getvalue()
    if code == 2 and not said.strip():
        return "exit code 2 without a sentence", ""
    return f"exit code {code}", "" if b"Traceback" not in said else said.decode(encoding)


def run(lines: int, seed: int) -> dict[str, object]:
    """``lines`` command lines of a seed, each in one of the encodings in turn."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        files, here = fixtures(Path(scratch)), Path.cwd()
        os.chdir(scratch)  # a file that a line writes stays here
        try:
            for number in range(lines):
                words, encoding = line(rng, files), ENCODINGS[number % len(ENCODINGS)]
                start = time.process_time()
                outcome, trace = attempt(words, encoding)
                longest = max(longest, time.process_time() - start)
                outcomes[outcome] += 1
                verbs[words[0]] += 1
                if trace or outcome not in ("exit code 0", "exit code 1", "exit code 2"):
                    shown = ascii(shlex.join(words).replace(scratch, "DIR"))
                    failures.append({"line": shown, "encoding": encoding, "outcome": outcome, "trace": trace[-1500:]})
        finally:
            os.chdir(here)
    return {
        "lines": lines,
        "seed": seed,
        "encodings": list(ENCODINGS),
        "outcomes": dict(sorted(outcomes.items())),
        "verbs": dict(sorted(verbs.items())),
        "longest_cpu_seconds": round(longest, 2),
        "failures": failures,
    }


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "cli_fuzz.json"))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from provenance import write_result

    found = run(args.lines, args.seed)
    write_result(Path(args.out), found)
    for failure in found["failures"][:20]:
        print(failure["outcome"], failure["encoding"], failure["line"], failure["trace"], sep="\n")
    print({name: found[name] for name in ("lines", "outcomes", "verbs", "longest_cpu_seconds")})
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
