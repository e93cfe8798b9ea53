"""What ``memopt.watch`` costs at its default interval, on the demo's model: ``python benchmarks/watch_cost.py``.

Two copies of one run, one of them watched, take turns, step by step, in one process; the ratio is of the sums over
whole intervals, each of which has one full reading. Beside it stands the time spent in the hooks themselves. Writes
results/watch_cost.json and .md.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from provenance import write_result

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.text import Corpus, load_text

RESULTS = Path(__file__).parent / "results"
EVERY = 100
SPECS = ("adamw", "adamw-8bit")


class Run:
    """One copy; ``inside`` is the time that the watch's hooks took, ``step_s`` that of ``optimizer.step()`` alone."""

    def __init__(self, spec: str, corpus: Corpus, batch: int, watched: bool) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(ModelConfig())
        self.optimizer = memopt.create(self.model, spec, lr=2e-3)
        self.corpus, self.batch = corpus, batch
        self.step = 0
        self.inside = 0.0
        self.optimizing = 0.0
        self.watch = memopt.watch(self.optimizer, EVERY, out=None) if watched else None
        if self.watch is not None:
            for name in ("_pre", "_post"):
                self._time(self.watch, name)

    def _time(self, watch: Any, name: str) -> None:
        """Hooks are registered already: hand the timed ones in again."""
        hook = getattr(watch, name)
        watch._hooks[("_pre", "_post").index(name)].remove()

        def timed(*arguments: Any) -> None:
            started = perf_counter()
            hook(*arguments)
            self.inside += perf_counter() - started

        register = self.optimizer.register_step_pre_hook if name == "_pre" else self.optimizer.register_step_post_hook
        watch._hooks[("_pre", "_post").index(name)] = register(timed)

    def advance(self) -> float:
        """One training step; returns the seconds it took."""
        started = perf_counter()
        self.step += 1
        self.optimizer.zero_grad()
        loss = self.model(self.corpus.batch(0, self.step, self.batch))
        loss.backward()
        if self.watch is not None:
            self.watch.loss(loss)
        updating = perf_counter()
        self.optimizer.step()
        self.optimizing += perf_counter() - updating
        return perf_counter() - started


def measure(spec: str, corpus: Corpus, batch: int, intervals: int) -> dict[str, Any]:
    plain, watched = Run(spec, corpus, batch, False), Run(spec, corpus, batch, True)
    for _ in range(EVERY):  # the first hundred steps have the dense readings of a young run
        plain.advance(), watched.advance()
    plain.optimizing = watched.inside = 0.0
    times: dict[str, list[float]] = {"plain": [], "watched": []}
    for step in range(intervals * EVERY):
        for name, run in (("plain", plain), ("watched", watched))[:: 1 if step % 2 else -1]:
            times[name].append(run.advance())
    steps = intervals * EVERY
    usual = median(times["plain"])
    return {
        "spec": spec,
        "step_s": usual,
        "optimizer_step_s": plain.optimizing / steps,
        "hooks_s_per_step": watched.inside / steps,
        "hooks_share_of_step": watched.inside / steps / usual,
        "ratio": sum(times["watched"]) / sum(times["plain"]),
        "ratio_by_interval": [
            sum(times["watched"][i : i + EVERY]) / sum(times["plain"][i : i + EVERY]) for i in range(0, steps, EVERY)
        ],
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--intervals", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = Corpus(load_text(), ModelConfig().context)
    found = [measure(spec, corpus, args.batch, args.intervals) for spec in SPECS]
    RESULTS.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "threads": args.threads, "batch": args.batch, "every": EVERY}
    write_result(RESULTS / "watch_cost.json", {**setting, "runs": found})
    lines = [
        "# What memopt.watch costs",
        "",
        f"The demo's model (1.3 M parameters, batch {args.batch}), a reading every {EVERY} steps, {args.threads} "
        "threads; `python benchmarks/watch_cost.py`.",
        "",
        "| spec | training step | optimizer.step() | hooks per step | share of the step | watched / plain |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| `{r['spec']}` | {r['step_s'] * 1e3:.1f} ms | {r['optimizer_step_s'] * 1e3:.2f} ms "
            f"| {r['hooks_s_per_step'] * 1e3:.3f} ms | {r['hooks_share_of_step']:.2%} | {r['ratio']:.3f} |"
            for r in found
        ),
    ]
    (RESULTS / "watch_cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
