"""State bytes against the live state of other people's optimizers."""

import copy

import pytest

import memopt

torch = pytest.importorskip("torch")


def live(make, dtype):
    """Bytes after one step, every storage once."""
    torch.manual_seed(0)
    layers = (torch.nn.Embedding(300, 64), torch.nn.Linear(64, 512), torch.nn.Linear(512, 300))
    model = torch.nn.Sequential(*layers).to(dtype)
    described = copy.deepcopy(model)
    optimizer = make(model.parameters())
    model(torch.zeros(2, dtype=torch.long)).sum().backward()
    optimizer.step()
    tensors = (t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}
    return sum(storages.values()), described


@pytest.mark.parametrize(
    ("name", "spec", "hyper"),
    [
        ("AdamW", "adamw", {}),
        ("Adam", "adam", {}),
        ("RAdam", "radam", {}),
        ("RMSprop", "rmsprop", {}),
        ("Adafactor", "adafactor", {}),
    ],
)
def test_torch(name, spec, hyper):
    nbytes, model = live(lambda p: getattr(torch.optim, name)(p, lr=1e-3, **hyper), torch.float32)
    assert memopt.price(model, spec, **hyper).nbytes == nbytes


def test_transformers_adafactor():
    adafactor = pytest.importorskip("transformers").Adafactor
    nbytes, model = live(adafactor, torch.float32)
    assert nbytes <= memopt.price(model, "adafactor").nbytes <= nbytes + 4 * 5  # its step and RMS are Python numbers


def test_bitsandbytes_8bit():
    bnb = pytest.importorskip("bitsandbytes")
    nbytes, model = live(lambda p: bnb.optim.AdamW8bit(p, lr=1e-3), torch.float32)
    steps = 4 * len(list(model.parameters()))  # Python numbers there
    assert memopt.price(model, "adamw-8bit", engine="bitsandbytes").nbytes - steps == nbytes
