"""This calculator's peak, accelerate's, DeepSpeed's and the bytes of a real step on the CPU, side by side.

    python benchmarks/estimates_compared.py

fp32 weights, AdamW; accelerate's figure is what its ``estimate-memory`` prints for training with Adam in fp32,
DeepSpeed's what its estimate_zero2_model_states_mem_needs says for one GPU without offload (weights in 16 bits). Writes
``benchmarks/results/estimates_compared.json``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import estimates_activations as real
import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes

os.environ.setdefault("DS_ACCELERATOR", "cpu")
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as deepspeeds
from provenance import write_result

CASES = [("llama", 1, "none"), ("llama", 1, "full"), ("gpt2", 1, "none"), ("bert", 1, "none"), ("mixtral", 1, "none")]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    real.SPEC = "adamw"
    results = []
    for family, size, how in CASES:
        r = real.measure(family, size, "float32", "sdpa", how, False)
        model = real.build(real.config(family, real.SIZES[size][0]), torch.float32, "sdpa")
        usage = estimate_training_usage(calculate_maximum_sizes(model)[0], "float32")
        parameters = sum(p.numel() for p in model.parameters())
        results.append(
            {
                "family": family,
                "checkpointing": how,
                "measured_nbytes": r["peak_nbytes"],
                "memopt_nbytes": r["peak_predicted"],
                "accelerate_nbytes": int(max(usage.values())),
                "deepspeed_nbytes": deepspeeds(parameters, 1, 1, cpu_offload=False)[1],
            }
        )
    for r in results:
        print(r, f"{r['memopt_nbytes'] / r['measured_nbytes']:.3f} {r['accelerate_nbytes'] / r['measured_nbytes']:.3f}")
    path = Path(__file__).parent / "results" / "estimates_compared.json"
    write_result(path, {"torch": torch.__version__, "results": results})


if __name__ == "__main__":
    main()
