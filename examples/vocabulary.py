"""A vocabulary that is extended in the middle of training; the state of the old rows stays, code for code.

python examples/vocabulary.py                         adamw-8bit
python examples/vocabulary.py --optim torch           torch.optim.AdamW, its state extended by hand

A model of characters is trained on plain letters; then the text has digits and signs, too, and the embedding and the
head get rows for them. Prints the mean loss of the last steps.
"""

from argparse import ArgumentParser
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import memopt

CONTEXT, BATCH, WIDTH = 8, 64, 64
TEXT = "\n".join(topics.values())
#: The characters that are known from the beginning, and those that come later.
FIRST = sorted({c for c in TEXT if c.isalpha() or c.isspace()})
LATER = sorted(set(TEXT) - set(FIRST))


class Model(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.hidden = nn.Linear(CONTEXT * WIDTH, 128)
        self.head = nn.Linear(128, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(x).flatten(1))))


def train(model: Model, opt: torch.optim.Optimizer, known: list[str], steps: int, g: torch.Generator) -> list[float]:
    number = {c: i for i, c in enumerate(known)}
    ids = torch.tensor([number[c] for c in TEXT if c in number])
    losses = []
    for _ in range(steps):
        at = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=g)
        piece = ids[at + torch.arange(CONTEXT + 1)]
        loss = nn.functional.cross_entropy(model(piece[:, :-1]), piece[:, -1])
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def extend(opt: torch.optim.Optimizer, weight: nn.Parameter, new: Tensor) -> None:
    if isinstance(opt, memopt.Optimizer):
        opt.append_rows(weight, new)
        return
    state = opt.state[weight]  # what memopt does in every format, by hand for torch.optim's
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.cat([state[key], torch.zeros_like(new)])
    weight.data = torch.cat([weight.data, new])
    weight.grad = None


def run(optim: str, steps: int, seed: int) -> float:
    """The mean loss of the last fifth of the steps after the vocabulary was extended."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = Model(len(FIRST))
    settings = {"lr": 3e-3, "weight_decay": 0.01}
    params = model.named_parameters()
    opt = torch.optim.AdamW(params, **settings) if optim == "torch" else memopt.create(params, optim, **settings)
    train(model, opt, FIRST, steps, g)
    for weight in (model.embedding.weight, model.head.weight):
        new = torch.randn(len(LATER), weight.shape[1]) * weight.detach().std()
        extend(opt, weight, new)
    losses = train(model, opt, [*FIRST, *LATER], steps, g)
    last = losses[-max(steps // 5, 1) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--optim", default="adamw-8bit")
    parser.add_argument("--steps", type=int, default=300, help="before the vocabulary is extended, and after")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loss = run(args.optim, args.steps, args.seed)
    print(f"{args.optim}: {len(FIRST)} characters, then {len(LATER)} more; loss {loss:.3f}")
