"""Muon over ranks: matrices that travel while others are worked on, against all that travel first and wait.

    python benchmarks/muon_ranks.py       writes benchmarks/results/muon_ranks.json and muon_ranks.md (two minutes)

Two and three processes of one gloo group on this machine, one thread each, step the hidden matrices of transformers
under ``/zero1``. ``together`` puts all matrices of a bucket together, works on them and sends them back, waiting each
time; ``in turns`` is what memopt does. Interleaved, medians of the slowest rank: seconds of a step, and those of them
in which a rank waited for an all-to-all (for what travels, and for ranks that have more to do). On one machine what
travels takes a processor's time; so the same again with a link of 10 Gbit/s, which is simulated: no all-to-all arrives
sooner than its bytes, behind those before them, would over such a link. Both ways end with the same bits, or the script
fails.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist

import memopt
from memopt.partitions import exchange

sys.path.insert(0, str(Path(__file__).parent.parent))
from muon import MODELS, parameters
from provenance import write_result

from tests.helpers import ranks

RESULTS = Path(__file__).parent / "results"
TURNS = {"together": 1, "in turns": exchange.ROUNDS}
CASES = ("GPT-2, 768", "Llama-like, 1024")
#: Bytes a second, by name.
LINKS = {"this machine": float("inf"), "10 Gbit/s, simulated": 1.25e9}


class Link:
    """Between this rank and the others: ``free`` when it has sent what it was given, at ``rate`` bytes a second."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0

    def send(self, nbytes: int) -> float:
        self.free = max(self.free, perf_counter()) + nbytes / self.rate
        return self.free


@contextmanager
def waits(found: list[float], link: Link) -> Iterator[None]:
    """Seconds in which this rank waits for an all-to-all, added up into the last of ``found``."""
    begin = dist.all_to_all_single

    class Timed:
        def __init__(self, work: Any, nbytes: int) -> None:
            self.work, self.until = work, link.send(nbytes)

        def wait(self) -> None:
            start = perf_counter()
            self.work.wait()
            sleep(max(self.until - perf_counter(), 0))
            found[-1] += perf_counter() - start

    def timed(into: Any, out: Any, comes: list[int], goes: list[int], **keywords: Any) -> Timed:
        here = dist.get_rank()
        crosses = max(sum(some) - some[here] for some in (comes, goes))  # both ways at once
        return Timed(begin(into, out, comes, goes, **keywords), crosses)

    dist.all_to_all_single = timed
    try:
        yield
    finally:
        dist.all_to_all_single = begin


def measure(case: str, spec: str, rounds: int, rate: float) -> dict[str, Any]:
    """Of each way the seconds of every round, waiting and in all, and a checksum of what came out."""
    made = {}
    for way in TURNS:
        named = parameters(*MODELS[case])
        made[way] = named, memopt.create(named, f"{spec}/zero1", lr=0.02)
    found: dict[str, Any] = {way: {"step": [], "waits": []} for way in TURNS}
    for n in range(rounds + 2):
        for way in list(TURNS)[:: -1 if n % 2 else 1]:
            exchange.ROUNDS = TURNS[way]
            dist.barrier()
            waited = [0.0]
            with waits(waited, Link(rate)):
                start = perf_counter()
                made[way][1].step()
                seconds = perf_counter() - start
            if n >= 2:
                found[way]["step"].append(seconds)
                found[way]["waits"].append(waited[0])
    first, second = (named for named, _ in made.values())
    if not all(torch.equal(p, q) for (_, p), (_, q) in zip(first, second, strict=True)):
        raise AssertionError("in turns is not what together is")
    return found


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--spec", default="muon-8bit")
    args = parser.parse_args()
    rows = []
    for world in (2, 3):
        for case in CASES:
            for link, rate in LINKS.items():
                by_rank = ranks.run(measure, world, case, args.spec, args.rounds, rate)
                row: dict[str, Any] = {"ranks": world, "matrices": case, "link": link}
                for way in TURNS:
                    for what in ("step", "waits"):
                        row[f"{what}, {way}"] = max(median(found[way][what]) for found in by_rank)
                rows.append(row)
                print(row, flush=True)
    write_result(RESULTS / "muon_ranks.json", {"spec": args.spec, "threads": 1, "rows": rows})
    lines = [
        "| ranks | matrices | link | step, together | step, in turns | of it waiting, together | waiting, in turns |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        figures = [f"{1e3 * row[f'{what}, {way}']:.0f} ms" for what in ("step", "waits") for way in TURNS]
        lines.append(f"| {row['ranks']} | {row['matrices']} | {row['link']} | {' | '.join(figures)} |")
    (RESULTS / "muon_ranks.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
