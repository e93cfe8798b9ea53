"""The random command lines of ``cli_fuzz.py``: what may follow each verb, and what a line draws from it.

A line depends on the seed and its number alone. Verbs that would train for long, time a step or serve until Ctrl-C get
lines that they refuse; ``tests/cli/test_cli_terminals.py`` holds that no verb and no flag is missing here.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import NamedTuple

ENCODINGS = ("ascii", "latin-1", "utf-8")
#: Columns of the terminal; "" is a pipe, where lines are not broken.
COLUMNS = ("", "", "40", "60", "100", "0", "x")
#: What no reader of text or of tensors takes.
BINARY = bytes(range(256)) * 4

ORDINARY = "1 1 1 2 2 3 4 8 10 16 64 100 128 1000"
NUMBERS = f"{ORDINARY} 0.1 0.5 0.01 0.02 "
NUMBERS += "0 10000000000000 999999999999999999 1000000000000000000000 -1 -0.5 1e3 1e400 nan inf"
WORDS = "x é … \u2028 日本 %s {} = ' \udce9 --- 8B 0x10 ١٢ true"
#: What a calm line, which is every second one, has nothing of.
WRONG = set(f"{WORDS} no nothing int3 sawtooth maybe adamw-9bit adamw- @ = betas =1 1e30GiB -3B 0".split(" "))
WRONG.update(("EMPTY", "BINARY", "FOLDER", "MISSING", "JSON", "NOWHERE", "lr=x", "exp_avg=x", "x.txt", ":", "json:no"))
MODELS = (
    "8B 350M 1T 0 -3B 1e9 8_000_000 llama-3.1-8b gpt2 mixtral-8x7b t5-base qwen2.5-7b EMPTY BINARY FOLDER MISSING JSON"
)
SPECS = (
    "adamw adamw-8bit adamw-4bit adafactor lion-8bit sgd adamw@paged adamw@host adamw-8bit@cpu adamw@disk adamw/zero1 "
    "adamw-8bit/zero3 adamw-bf16+split lookahead(adamw)-8bit muon-8bit(adamw) paged_adamw_8bit adamw- @ adamw-9bit"
)
DTYPES = "bf16 fp32 fp16 int3"
KINDS = "constant linear cosine cosine_restarts inverse_sqrt step wsd sawtooth"
HYPER = {"--hyper": "momentum=0.9 amsgrad=true lr=x betas ="}

#: Flag -> what may follow it, or "" for a switch.
STEP = {
    "--seq": NUMBERS, "--batch": NUMBERS, "--accumulate": NUMBERS, "--checkpointing": "none full selective every-2 no",
    "--attention": "sdpa flash eager no", "--loss": "full chunked fused no", "--outputs": "dropped kept no",
    "--lora": NUMBERS, "--lora-targets": "all-linear attention default q_proj nothing", "--lora-dtype": DTYPES,
    "--lora-dropout": NUMBERS, "--lora-kind": "lora rslora dora no", "--modules-to-save": "lm_head nothing",
    "--quantised": "nf4 nf4-double int8 gptq no", "--kbit-prepare": "yes no maybe", "--frozen": "embed* *",
    "--train": "*norm* nothing", "--release-gradients": "", "--mixed": DTYPES, "--offload-activations": "",
    "--offload-params": "", "--compile": "", "--float8": "", "--deepspeed": "", "--bucket": NUMBERS, "--packed": "",
    "--head": "causal-lm none classification no", "--reference-model": "same gpt2 8B nothing", "--tp": NUMBERS,
    "--pp": NUMBERS, "--cp": NUMBERS, "--ep": NUMBERS, "--replicas": NUMBERS, "--regather": "",
    "--schedule": "1f1b gpipe interleaved-2 interleaved-0 no", "--alloc-conf": "expandable_segments:True x =",
    "--versions": "torch=2.6 transformers=4.50,torch=2.8 torch nothing=1", "--workspace": "1GiB 0 x 1e30GiB",
    "--directory": "run /", "--offload-gradients": "false early true no", "--weights": DTYPES,
    "--gradients": DTYPES, "--json": "", "--optim": SPECS, **HYPER,
}  # fmt: skip
CARDS = "8GiB 24GiB rtx-4090 h100 0 x 1e30GiB"
#: Verb -> (what stands behind it, its flags).
VERBS = {
    "estimate": (MODELS, STEP | {"--gpu": CARDS, "--world": NUMBERS, "--models": "", "--accept-tight": "",
                 "--from": "EMPTY BINARY JSON MISSING FOLDER", "--html": "OUT FOLDER NOWHERE",
                 "--plot": "NOWHERE FOLDER x.txt", "--emit": "accelerate deepspeed transformers python x",
                 "--against": "EMPTY BINARY JSON MISSING", "--module": "x : json:no json:dumps MISSING:x",
                 "--inputs": "x json:no"}),
    "plan": ("llama-3.2-1b gpt2 EMPTY BINARY x", STEP | {"--gpu": CARDS, "--gpus": NUMBERS}),
    "solve": ("llama-3.2-1b gpt2 8B EMPTY BINARY x", STEP | {"--gpu": CARDS, "--world": NUMBERS, "--accept-tight": "",
              "--largest": "batch seq lora parameters layers-trained x", "--smallest": "gpus gpu x"}),
    "list": ("specs recipes x llama-2-7b", {"--aliases": "", "--json": "", "--no": ""}),
    "schedule": (KINDS, {"--warmup": NUMBERS, "--total-steps": NUMBERS, "--floor": NUMBERS, "--lr": NUMBERS,
                 "--cycle": NUMBERS, "--cycle-mult": NUMBERS, "--timescale": NUMBERS, "--hold": NUMBERS,
                 "--every": NUMBERS, "--gamma": NUMBERS, "--decay": NUMBERS, "--json": "",
                 "--plot": "NOWHERE FOLDER x.txt"}),
    "measure": ("-- python MISSING BINARY x", {"--out": "OUT FOLDER NOWHERE"}),
    "train": ("EMPTY BINARY MISSING", {"--steps": NUMBERS, "--batch": NUMBERS, "--context": NUMBERS, "--world": NUMBERS,
              "--threads": NUMBERS, "--timeout": NUMBERS, "--seed": NUMBERS, "--lr": NUMBERS, "--optim": SPECS,
              "--json": "OUT FOLDER NOWHERE", **HYPER}),
    "lr-find": ("EMPTY BINARY MISSING TEXT TEXT", {"--from": NUMBERS, "--to": NUMBERS, "--steps": NUMBERS,
                "--batch": NUMBERS, "--context": NUMBERS, "--seed": NUMBERS, "--optim": SPECS,
                "--plot": "NOWHERE FOLDER x.txt", "--json": "", **HYPER}),
    "convert": ("SAVED SAVED SAVED EMPTY BINARY JSON MISSING FOLDER NEW", {"--to": "adamw-8bit torch dcp x @",
                "--from": "adamw x", "--engine": "native bitsandbytes x",
                "--fill": "x exp_avg=0 =1 exp_avg=x", "--dry-run": ""}),
    "inspect": ("SAVED EMPTY BINARY JSON MISSING FOLDER", {"--from": "adamw x", "--json": ""}),
    "web": ("", {"--port": "-1 70000 x 1e3 ١٢", "--write": "OUT FOLDER NOWHERE", "--pyodide": "FOLDER MISSING EMPTY"}),
    "bench": ("x", {"--numel": "x 0.5", "--rounds": "x nan", "--processes": "x", "--threads": "x", "--largest": "x",
              "--out": "NOWHERE", "--brief": "", "--scaling": "", "--small": ""}),
    "doctor": ("", {"--json": "", "--deepspeed": "NOWHERE FOLDER x.txt"}),
    "completion": ("bash zsh fish x", {}),
}  # fmt: skip
#: What most lines of a verb have, so that some of them get to the work.
USUAL = {"estimate": ["--seq", "128", "--gpu", "24GiB"], "schedule": ["--total-steps", "500"]}
USUAL |= {"convert": ["--to", "adamw-8bit"], "solve": ["--gpu", "24GiB", "--largest", "batch", "--seq", "128"]}
#: How often each verb is drawn, of 1,000; a plan searches over hundreds of estimates, doctor measures the disk.
WEIGHTS = {"estimate": 300, "plan": 10, "solve": 10, "list": 90, "schedule": 250, "measure": 60, "train": 80}
WEIGHTS |= {"lr-find": 80, "convert": 60, "inspect": 40, "web": 20, "bench": 5, "doctor": 2, "completion": 10}


class Line(NamedTuple):
    """A command line, and the terminal that it is tried under."""

    words: list[str]
    encoding: str
    columns: str


def drawn(seed: int, number: int, files: dict[str, str]) -> Line:
    """The line of this number."""
    rng = random.Random(f"{seed}:{number}")
    return Line(_words(rng, files), ENCODINGS[number % len(ENCODINGS)], rng.choice(COLUMNS))


def _words(rng: random.Random, files: dict[str, str]) -> list[str]:
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
    count = rng.choice((0, 0, 0, 1, 1, 1, 2) if calm else (0, 1, 1, 2, 2, 3, 5))
    for flag in rng.sample(list(flags), min(count, len(flags))):
        words.append(flag)
        if flags[flag]:
            words.append(_word(rng, flags[flag], files, calm))
    words += {"web": ["--port", "70000"], "bench": ["--out", files["NOWHERE"], "--rounds", "x"]}.get(verb, [])
    if verb == "lr-find" and files["TEXT"] in words:  # trains: briefly
        words += ["--steps", "10", "--batch", "2", "--context", "16"]
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


class Fixtures:
    """A folder of files that hold nothing, bytes, a text, JSON of another kind and a checkpoint; placeholders of a pool
    are its paths. Every line finds it as it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._pristine = folder / "here", folder / "pristine"
        self._make(self._pristine)
        names = {"EMPTY": "empty.json", "BINARY": "binary.safetensors", "JSON": "other.json", "FOLDER": "folder"}
        names |= {"TEXT": "text", "SAVED": "saved", "NEW": "new", "MISSING": "missing", "OUT": "out"}
        self.names = {name: str(self.folder / path) for name, path in names.items()}
        self.names["NOWHERE"] = str(self.folder / "no/such/folder/out.png")
        self._state = self._copy()

    def restore(self) -> None:
        """Undo what a line wrote: the next would train on a folder of text, or find what it is to miss."""
        if self._seen() != self._state:
            self._state = self._copy()

    def _copy(self) -> list[tuple[str, int, int]]:
        self.folder.mkdir(exist_ok=True)  # stays the same folder: lines run in it
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(self._pristine, self.folder, dirs_exist_ok=True)
        return self._seen()

    def _seen(self) -> list[tuple[str, int, int]]:
        found = [(path, path.lstat()) for path in sorted(self.folder.rglob("*"))]
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]

    @staticmethod
    def _make(folder: Path) -> None:
        import torch

        import memopt

        folder.mkdir(parents=True)
        (folder / "empty.json").touch()
        (folder / "binary.safetensors").write_bytes(BINARY)
        (folder / "text").write_text("The same sentence again, as often as it takes. " * 200)
        (folder / "other.json").write_text('{"model_type": "nothing", "hidden_size": [1]}')
        (folder / "folder").mkdir()
        model = torch.nn.Linear(8, 8)
        optimizer = memopt.create(model, "adamw", lr=1e-3)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        memopt.save(folder / "saved", model=model, optimizer=optimizer)
