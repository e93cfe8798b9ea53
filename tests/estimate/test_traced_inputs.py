"""Inputs that are made for a step, and changed by what the forward pass says that it lacks."""

from types import SimpleNamespace

import pytest

from estimators import InputError

torch = pytest.importorskip("torch")

from estimators.traced.inputs import InputShape, Mended, inputs, told  # noqa: E402
from estimators.traced.step import Faked, fake_weights  # noqa: E402
from estimators.traced.step import run as step  # noqa: E402

ASKED = InputShape(2, 8, torch.float32)


class Tower(torch.nn.Module):
    """Reads sound and, always, which of it is meant."""

    def __init__(self, layer, check=lambda **given: None, **fields):
        super().__init__()
        self.layer, self.check = layer, check
        self.config = SimpleNamespace(model_type="tower", vocab_size=100, hidden_size=8, **fields)

    def forward(self, input_features, input_ids=None, pixel_values=None, image_embeds=None, decoder_input_ids=None):
        self.check(input_ids=input_ids, pixel_values=pixel_values, image_embeds=image_embeds, decoder=decoder_input_ids)
        return self.layer(input_features).sum()


def first(module):
    """What a step of the module is run with in the end."""
    faked = Faked()
    fake_weights(module, faked)
    ahead, error = Mended(module, ASKED), None

    def tried(given):
        try:
            step(module, given, faked)
            return True
        except Exception as one:
            nonlocal error
            error = one
            ahead.failed(given, one)
            return False

    for given, _ in inputs(module, ASKED, faked):
        if tried(given):
            return given
    for given in ahead:
        if tried(given):
            return given
    raise error


def lacks(name):
    def check(**given):
        if given[name] is None:
            raise ValueError(f"You have to specify {name}")

    return check


def either(**given):
    if (given["pixel_values"] is None) == (given["image_embeds"] is None):
        raise ValueError("You must specify exactly one of pixel_values and image_embeds")


class Unpacks(torch.nn.Module):
    """Sound with its channels apart."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 4, 3)

    def forward(self, x):
        batch, channels, bins, frames = x.shape
        return self.conv(x.reshape(batch, channels, bins * frames))


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (Tower(torch.nn.Linear(80, 4)), {"input_features": [2, 3000, 80]}),
        (Tower(torch.nn.Linear(160, 4)), {"input_features": [2, 3000, 160]}),  # no field says so: its weights do
        (Tower(torch.nn.LayerNorm(40)), {"input_features": [2, 3000, 40]}),
        (Tower(torch.nn.Conv1d(128, 4, 3), num_mel_bins=64), {"input_features": [2, 128, 3000]}),
        (Tower(torch.nn.ConvTranspose1d(3000, 4, 3)), {"input_features": [2, 3000, 80]}),
        (Tower(torch.nn.Linear(80, 4), lacks("pixel_values"), image_size=32), {"pixel_values": [2, 3, 32, 32]}),
        (Tower(torch.nn.Linear(80, 4), either, image_size=32), {"pixel_values": [2, 3, 32, 32]}),
        (Tower(Unpacks()), {"input_features": [2, 1, 3000, 80]}),
    ],
)
def test_what_a_step_lacks(module, given):
    found = first(module)
    assert {name: list(found[name].shape) for name in given} == given
    assert all(f"{name} {shape}" in told(found) for name, shape in given.items())


def test_what_no_input_mends():
    with pytest.raises(RuntimeError, match="broadcast"):
        first(Tower(torch.nn.Linear(80, 4), lambda **given: torch.zeros(3) + torch.zeros(4)))


def test_a_module_without_a_forward_pass():
    with pytest.raises(InputError, match="Module has no forward pass of its own"):
        next(inputs(torch.nn.Module(), ASKED, Faked()))


class Looks(torch.nn.Module):
    """Names an expert by a number of a tensor, makes a tensor of such numbers, and converts itself on the way."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleDict({"expert_3": torch.nn.Linear(4, 4)})
        self.router = torch.nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x):
        self.router = self.router.to(torch.float32)
        places = torch.tensor([3, 5])
        expert = self.experts[f"expert_{places[0]}"]
        lengths = torch.tensor([places[0], places[1]])
        torch.distributions.Categorical(logits=self.router(x))
        return expert(self.router(x)).sum() * lengths.sum().item()


def test_numbers_are_read_as_of_real_tensors():
    module, faked, validated = Looks(), Faked(), torch.distributions.Distribution._validate_args
    fake_weights(module, faked)
    found = step(module, {"x": torch.zeros(2, 4)}, faked)
    assert found.segments.recorded().slots
    assert module.router.weight.dtype is torch.float32
    assert torch.distributions.Distribution._validate_args == validated
    assert f"{torch.tensor(3):02d}" == "03"
