"""A small decoder-only transformer over bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memopt.train.job import ModelConfig
from memopt.train.text import VOCABULARY


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each on a normalised copy of the stream and added back to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, time, width] -> the same shape; a position sees itself and what comes before it."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, time, width / heads]
        x = x + self.projection(attended.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return out


class LanguageModel(nn.Module):
    """Bytes in, the cross-entropy of the next byte out. Embedding and output layer are one tensor.

    Weights begin as N(0, 0.02²), those that write to the stream smaller by sqrt(2 layers), as in GPT-2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                writes = name.endswith(("projection.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """``windows`` int64 [batch, time + 1] -> the mean loss in nats per byte, fp32 []."""
        x = self.embedding(windows[:, :-1])
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.norm(x))  # [batch, time, 256]
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
