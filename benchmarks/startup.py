"""Start-up of the calculator against a bare Python, interleaved in one run; medians. The bar: at most five times.

    python benchmarks/startup.py

Writes ``benchmarks/results/startup.json``. Run it in the environment of ``make test``: packages that hook into the
start of every Python (``.pth`` files) make the bare start slower and the ratio meaningless.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from provenance import write_result

RUNS = 40
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "memopt estimate 8B": ["-m", "memopt", "estimate", "8B"],
    "memopt estimate llama-3.1-8b --gpu 24GiB": ["-m", "memopt", "estimate", "llama-3.1-8b", "--gpu", "24GiB"],
    "import memopt": ["-c", "import memopt"],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(RUNS + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment, check=False)
            if run:  # the first writes the bytecode
                seconds[name].append(time.perf_counter() - start)
    bare = median(seconds["python -c pass"])
    results = {
        name: {"median_ms": round(median(s) * 1e3, 2), "ratio_to_bare": round(median(s) / bare, 2)}
        for name, s in seconds.items()
    }
    for name, row in results.items():
        print(f"{name:<42} {row['median_ms']:7.1f} ms  {row['ratio_to_bare']:5.2f} x")
    path = Path(__file__).parent / "results" / "startup.json"
    write_result(path, {"runs": RUNS, "python": sys.version.split()[0], "results": results})


if __name__ == "__main__":
    main()
