"""The simulated device of the tests of ``@cpu``, and models on it."""

import torch
from torch import nn

import memopt
from tests.helpers.cases import HYPER, odd_model

SPECS = ["adamw@cpu", "adamw-8bit@cpu", "adafactor-8bit@cpu", "lion-4bit@cpu", "sgd@cpu", "lookahead(adamw)-8bit@cpu"]
OPTIONS = {"offload_gradients": True, "workspace": "1MiB"}
#: Seconds of an operation: all alike, so that a timeline can be read.
EVEN = dict.fromkeys(("backward", "down", "host", "up", "apart"), (1.0, 0.0))


class Deep(nn.Module):
    """Eight square layers; with a workspace of 1 MiB none of width 320 fits into a lease, and two or three are on the
    way at once."""

    def __init__(self, dtype=torch.float32, width=320) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(8)).to(dtype)

    def forward(self, seed):
        dtype = self.layers[0].weight.dtype
        x = torch.randn(4, len(self.layers[0].weight), generator=torch.Generator().manual_seed(seed)).to(dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def narrow():
    return Deep(width=160)


def on_clock(device, model):
    """Gradients are ready when the clock says so."""

    def made(g: torch.Tensor) -> None:
        device.clock.submit("backward", lambda: None, [], g.nbytes)

    for p in model.parameters():
        p.register_hook(made)


def twins(spec, make=odd_model, **options):
    """A model and its optimizer on the simulated device with gradients on the host, and the same ``@device``."""
    stem = str(memopt.parse(spec).replace(placement="device"))
    found = []
    for text, more in ((spec, {**OPTIONS, **options}), (stem, {})):
        torch.manual_seed(0)
        model = make()
        found.append((model, memopt.create(model, text, **HYPER.get(memopt.parse(spec).rule, {}), **more)))
    return found


def early_twins(spec="adamw@cpu", make=narrow, **options):
    """The same with copies in backward()."""
    return twins(spec, make, **{"offload_gradients": "early", "workspace": "8MiB", **options})


def counts(opt):
    """Copies that were made before the last step, and that it used."""
    early = opt.placement_stores.of("")._prefetch
    return early.made, early.used
