"""What a traced step of a large model costs: seconds and resident memory of one process, from its start.

    python benchmarks/estimates_large.py        half a minute; writes benchmarks/results/estimates_large.json and .md

Each case is a process of its own with an empty cache, as a user's first estimate: Python, torch and transformers are
imported, the module is built on the meta device from its configuration, and one step of 4,096 tokens is traced. The bar
for a model of 70B: 10 s of the processor and 4 GiB. Llama has a formula, which is beside it: it is not used here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from provenance import write_result

#: Name -> (configuration, checkpointing). Dimensions are those of the published models.
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
_QWEN_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama 3.1 70B": (_LLAMA, "none"),
    "Llama 3.1 70B, checkpointed": (_LLAMA, "full"),
    "Qwen3 235B A22B, checkpointed": (_QWEN_MOE, "full"),
}
BAR_SECONDS, BAR_NBYTES = 10, 4 * 2**30
SEQ = 4096


def one(config: dict[str, Any], how: str) -> dict[str, Any]:
    """In this process, which has imported nothing yet."""
    import resource
    import time

    from estimators.memory.step_rows import run
    from estimators.traced.from_transformers import from_transformers
    from estimators.training import Training

    model = from_transformers(config, "config")
    ran, why = run(model, Training(seq=SEQ, checkpointing=how))
    if ran is None:
        raise SystemExit(why)
    return {
        "parameters": sum(prod(shape) for _, shape in model.shapes),
        "saved_nbytes": ran.saved,
        "seconds": round(time.process_time(), 2),
        "resident_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="a process of this one's")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one(*CASES[args.case])))
        return
    rows = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--case", name]
            environment = {**os.environ, "MEMOPT_CACHE": cache}
            ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        rows[name] = json.loads(ended.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    out = Path(__file__).parent / "results" / "estimates_large.json"
    write_result(out, {"tokens": SEQ, "bar_seconds": BAR_SECONDS, "bar_nbytes": BAR_NBYTES, "results": rows})
    lines = [
        "# A traced step of a large model",
        "",
        f"One step of {SEQ:,} tokens, traced without a formula, in a process of its own with an empty cache: seconds",
        "of the processor from the start of Python, imports of torch and transformers included, and the most memory",
        f"that the process had. The bar for 70B is {BAR_SECONDS} s and {BAR_NBYTES >> 30} GiB.",
        "",
        "| model | parameters | saved, GiB | seconds | resident, GiB |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {r['parameters']:,} | {r['saved_nbytes'] / 2**30:.1f} | {r['seconds']:.1f} | "
            f"{r['resident_nbytes'] / 2**30:.2f} |"
            for name, r in rows.items()
        ),
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
