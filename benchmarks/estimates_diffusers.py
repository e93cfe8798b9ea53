"""Steps of diffusers' denoisers as estimated from a trace, beside real ones on a CPU.

    python benchmarks/estimates_diffusers.py        writes benchmarks/results/estimates_diffusers.json and .md

A UNet with cross-attention (as Stable Diffusion's), one with attention of its own (as DDPM's), a DiT, small, in fp32,
with and without checkpointing. Saved bytes are what the forward pass leaves, the peak is that of tensors with the
weights; bars 1 % and 5 %. Checkpointing keeps no random state, which is no tensor of a card's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from provenance import write_result
from torch.utils.checkpoint import checkpoint

import estimators
from estimators.measure import traced

RESULTS = Path(__file__).parent / "results" / "estimates_diffusers.json"
TIMES = torch.tensor([3, 7])


def models() -> Iterator[tuple[torch.nn.Module, dict[str, Any]]]:
    sizes = {"sample_size": 32, "block_out_channels": (64, 128), "layers_per_block": 1}
    unet = UNet2DConditionModel(
        **sizes,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )
    text = torch.randn(2, 16, 64)
    yield unet, {"sample": torch.randn(2, 4, 32, 32), "timestep": TIMES, "encoder_hidden_states": text}
    alone = UNet2DModel(
        **sizes, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    yield alone, {"sample": torch.randn(2, 3, 32, 32), "timestep": TIMES}
    dit = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, num_layers=4, sample_size=32, norm_num_groups=32
    )
    images = {"hidden_states": torch.randn(2, 4, 32, 32), "class_labels": torch.tensor([1, 2])}
    yield dit, {**images, "timestep": TIMES}


def compared(module: torch.nn.Module, inputs: dict[str, Any], checkpointing: str) -> dict[str, Any]:
    module.train()
    if checkpointing == "full":
        kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        module.enable_gradient_checkpointing(kept)  # type: ignore[operator]
    box: dict[str, torch.Tensor] = {}

    def forward() -> None:
        box["loss"] = module(**inputs).sample.sum()

    def backward() -> None:
        box.pop("loss").backward()

    forward(), backward(), module.zero_grad()
    curve = traced(("forward", forward), ("backward", backward))
    module.zero_grad()
    given = sum(t.nbytes for t in inputs.values())
    weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    saved = curve.live[dict(curve.marks)["backward"] - 1] + given
    peak = weights + curve.peak_of_tensors + given
    found = estimators.estimate(module, inputs=inputs).activations
    assert found is not None
    said = weights + max(found.forward.activations, found.loss.activations, sum(found.backward))
    return {
        "class": type(module).__name__,
        "parameters": sum(p.numel() for p in module.parameters()),
        "checkpointing": checkpointing,
        "saved_nbytes": saved,
        "saved_error": round(found.saved / saved - 1, 5),
        "peak_nbytes": peak,
        "peak_error": round(said / peak - 1, 5),
    }


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# diffusers' denoisers",
        "",
        "Traced steps beside real ones on a CPU, fp32. Written by `python benchmarks/estimates_diffusers.py`.",
        "",
        "| class | parameters | checkpointing | saved, bytes | estimate | peak, bytes | estimate |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['class']} | {r['parameters']:,} | {r['checkpointing']} | {r['saved_nbytes']:,} | "
            f"{r['saved_error']:+.2%} | {r['peak_nbytes']:,} | {r['peak_error']:+.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [compared(*model, how) for how in ("none", "full") for model in models()]
    write_result(RESULTS, {"rows": rows})
    RESULTS.with_suffix(".md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
