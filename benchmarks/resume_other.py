"""A run begun with one optimizer and resumed with another, inside Trainer, accelerate and Lightning.

    python benchmarks/resume_other.py        writes benchmarks/results/resume_other.json and .md

For every pair of torch's AdamW and memopt specs: a small language model trains, the framework writes its own checkpoint
in the middle, another process's worth of objects is made with the other spec and goes on from it by the framework's own
call. Reported is the relative difference of the last loss to a run that never changed; beside it what the same pair
differs by from the start, which is what the format costs by itself. A pair whose state would have to be made up is
refused, and its sentence stands in the table.

Every pair is run twice: converted by ``load_state_dict`` while it is loaded, and by ``memopt convert`` in the place of
the framework's own file before. The losses must be the same to the bit. torch's AdamW, which converts nothing itself,
goes on from the second alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memopt

RESULTS = Path(__file__).parent / "results" / "resume_other.json"
SPECS = ("torch AdamW", "adamw", "adamw-8bit", "adamw-4bit", "adafactor")
STEPS, SAVED, BATCH, LENGTH, VOCABULARY = 40, 20, 8, 24, 64
LR = 3e-3


class Model(nn.Module):
    """Next token from the last two, through matrices large enough to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.hidden = nn.Linear(256, 256)
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        e = self.embed(x)
        pairs = torch.cat([e[:, :-2], e[:, 1:-1]], -1)
        scores = self.head(torch.relu(self.hidden(pairs)))
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), x[:, 2:].flatten())}


def rows() -> list[dict[str, torch.Tensor]]:
    """A deterministic text: each token is a fixed function of the two before, with some noise."""
    g = torch.Generator().manual_seed(0)
    table = torch.randint(0, VOCABULARY, (VOCABULARY, VOCABULARY), generator=g)
    found = torch.randint(0, VOCABULARY, (STEPS * BATCH, LENGTH), generator=g)
    for i in range(2, LENGTH):
        told = torch.rand(len(found), generator=g) < 0.9
        found[:, i] = torch.where(told, table[found[:, i - 2], found[:, i - 1]], found[:, i])
    return [{"x": row} for row in found]


def optimizer(model: nn.Module, what: str) -> torch.optim.Optimizer:
    if what == "torch AdamW":
        return torch.optim.AdamW(model.named_parameters(), lr=LR)
    return memopt.create(model, what, lr=LR)


def started() -> Model:
    torch.manual_seed(0)
    return Model()


def under_trainer(what: str, path: str, resume: bool, stop: int) -> float:
    import transformers

    cls, keywords = (torch.optim.AdamW, {}) if what == "torch AdamW" else (memopt.Optimizer, {"spec": what})
    arguments = transformers.TrainingArguments(
        path, max_steps=stop, save_steps=SAVED, per_device_train_batch_size=BATCH, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        started(), arguments, train_dataset=rows(), optimizer_cls_and_kwargs=(cls, {"lr": LR, **keywords})
    )
    trainer.train(resume_from_checkpoint=f"{path}/checkpoint-{SAVED}" if resume else None)
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def under_accelerate(what: str, path: str, resume: bool, stop: int) -> float:
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = started()
    model, opt = accelerator.prepare(model, optimizer(model, what))
    if resume:
        accelerator.load_state(path)
    data, loss = rows(), torch.zeros(())
    for step in range(SAVED if resume else 0, stop):
        batch = torch.stack([row["x"] for row in data[step * BATCH : (step + 1) * BATCH]])
        loss = model(batch)["loss"]
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        if step + 1 == SAVED and not resume:
            accelerator.save_state(path)
    return loss.item()


def under_lightning(what: str, path: str, resume: bool, stop: int) -> float:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data, losses = rows(), []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = started()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            step = self.global_step
            x = torch.stack([row["x"] for row in data[step * BATCH : (step + 1) * BATCH]])
            loss = self.net(x)["loss"]
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self, what)

    saving = ModelCheckpoint(path, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=stop,
        default_root_dir=path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving],
    )
    loader = torch.utils.data.DataLoader(range(STEPS), batch_size=1)
    trainer.fit(Module(), loader, ckpt_path=f"{path}/step={SAVED}.ckpt" if resume else None)
    return float(losses[-1])


#: Where each keeps the optimizer.
FILES = {
    "Trainer": f"checkpoint-{SAVED}/optimizer.pt",
    "accelerate": "optimizer.bin",
    "Lightning": f"step={SAVED}.ckpt",
}
FRAMEWORKS = {"Trainer": under_trainer, "accelerate": under_accelerate, "Lightning": under_lightning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="*", default=list(FRAMEWORKS), choices=list(FRAMEWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found: dict[str, Any] = {}
    differences: list[str] = []
    for name in arguments.frameworks:
        run = FRAMEWORKS[name]
        table: dict[str, dict[str, Any]] = {}
        whole: dict[str, float] = {}
        for before in SPECS:
            with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole[before] = run(before, path, False, STEPS)
                table[before] = {}
                for after in SPECS:
                    found_by = by_command_line(name, path, after, whole[before])
                    table[before][after] = found_by
                    # torch's own load_state_dict reads its own state alone
                    if after != "torch AdamW" or before == after:
                        try:
                            table[before][after] = run(after, path, True, STEPS) / whole[before] - 1
                        except ValueError as error:
                            table[before][after] = str(error)
                        same = isinstance(found_by, str) == isinstance(table[before][after], str)
                        if not same or (not isinstance(found_by, str) and found_by != table[before][after]):
                            differences.append(f"{name}, {before} -> {after}: {found_by}, not {table[before][after]}")
                    print(name, before, "->", after, table[before][after], flush=True)
        found[name] = {
            "pairs": sum(map(len, table.values())),
            "changed": table,
            "never": {spec: loss / whole["torch AdamW"] - 1 for spec, loss in whole.items()},
        }
    print("\n".join(differences) or "the command line's files go on to the same losses")
    write_result(RESULTS, {"differences": differences, "steps": STEPS, "saved": SAVED, "frameworks": found})
    RESULTS.with_suffix(".md").write_text(markdown(found, differences))
    sys.exit(1 if differences else 0)


def by_command_line(name: str, path: str, after: str, whole: float) -> Any:
    """The same by ``memopt convert`` in the place of the framework's file, which ``inspect`` reads; or its reason."""
    from memopt.cli import main as memopt_main

    with tempfile.TemporaryDirectory() as other:
        there = f"{other}/copy"
        shutil.copytree(path, there)
        file, to = f"{there}/{FILES[name]}", "torch" if after == "torch AdamW" else after
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            if memopt_main(["convert", file, file, "--to", to]):
                return said.getvalue().strip()
            if memopt_main(["inspect", file]):
                return f"inspect: {said.getvalue().strip()}"
        return FRAMEWORKS[name](after, there, True, STEPS) / whole - 1


def markdown(found: dict[str, Any], differences: list[str]) -> str:
    lines = ["# Resumed with another string", ""]
    lines += [f"Loss after {STEPS} steps, the checkpoint after {SAVED}: relative difference to never changing.", ""]
    for name, result in found.items():
        lines += [f"## {name}", "", "| begun with | " + " | ".join(SPECS) + " | never changed, to torch AdamW |"]
        lines.append("|---|" + "---|" * (len(SPECS) + 1))
        for before, row in result["changed"].items():
            cells = [_cell(row.get(after)) for after in SPECS]
            lines.append(f"| {before} | " + " | ".join(cells) + f" | {result['never'][before]:+.3%} |")
        lines.append("")
    same = "is the same to the bit" if not differences else f"differs: {'; '.join(differences)}"
    lines += [
        "refused: a moment was not saved and would have to be made up. Each pair was converted while it was loaded,",
        f"and by `memopt convert` in the place of the framework's file before: the loss {same}. torch's AdamW",
        "goes on from the latter alone.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else "refused" if isinstance(value, str) else f"{value:+.3%}"


if __name__ == "__main__":
    main()
