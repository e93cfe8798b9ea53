"""State bytes against the live state of other people's optimizers."""

import copy
import json
import sys

import pytest

import memopt
from estimators.models import from_hub

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), [("AdamW8bit", "8bit"), ("AdamW4bit", "4bit"), ("AdamWFp8", "fp8")])
def test_torchao(name, kind, dtype, monkeypatch):
    """Codes, scales and maps of torchao's tensor subclasses, one by one."""
    theirs = pytest.importorskip("torchao.optim")
    from estimators.memory.other_optimizers import torchao_nbytes

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 300), torch.nn.Linear(300, 7)).to(dtype)
    optimizer = getattr(theirs, name)(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its step, eagerly: the same state
    optimizer.step()
    nbytes = 0
    for state in optimizer.state.values():
        for value in state.values():
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            nbytes += sum(getattr(value, part).nbytes for part in parts) if parts else value.nbytes
    assert torchao_nbytes([tuple(p.shape) for p in model.parameters()], kind, dtype.itemsize) == nbytes


CONFIG = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 99}


class TestHub:
    """Ids of the Hub, without the network."""

    def test_an_id_is_its_configuration(self, monkeypatch, tmp_path):
        from estimators import resolve

        hub = pytest.importorskip("huggingface_hub")
        file = tmp_path / "config.json"
        file.write_text(json.dumps(CONFIG))
        asked = []
        monkeypatch.setattr(from_hub, "_reachable", lambda endpoint: True)
        monkeypatch.setattr(hub, "hf_hub_download", lambda name, of, **how: (asked.append(name), str(file))[1])
        assert resolve("nobody/something").shapes == resolve(CONFIG).shapes
        assert resolve("openai-community/gpt2").name == "gpt2"  # built in: nobody is asked
        assert asked == ["nobody/something"]

    def test_a_failure_is_one_sentence(self, monkeypatch):
        from estimators import InputError, resolve

        hub = pytest.importorskip("huggingface_hub")

        def nowhere(name, of, **how):
            raise OSError("We couldn't connect\nto the Hub")

        monkeypatch.setattr(from_hub, "_reachable", lambda endpoint: True)
        monkeypatch.setattr(hub, "hf_hub_download", nowhere)
        with pytest.raises(InputError, match="did not help: We couldn't connect to the Hub"):
            resolve("nobody/lama-3-8b")
        monkeypatch.setattr(from_hub, "_reachable", lambda endpoint: False)
        with pytest.raises(InputError, match=r"it cannot be reached, and its cache has no config\.json"):
            resolve("nobody/lama-3-8b")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(InputError, match="pip install huggingface_hub"):
            resolve("nobody/lama-3-8b")
