"""Hostile configurations: an estimate or one clear sentence, never a traceback."""

import copy
import json
import random
import time

from estimators.calculator import estimate
from estimators.errors import InputError
from estimators.models.families import FAMILIES
from estimators.models.from_files import parse_json
from estimators.models.published import KNOWN
from memopt.cli import main

CONFIGS = 800
SEED = 20240611
#: A single hostile configuration may not keep anybody waiting either.
SLOWEST_SECONDS = 2.0
OPTIONAL = (
    "head_dim",
    "num_key_value_heads",
    "mlp_only_layers",
    "id2label",
    "n_inner",
    "weird",
    "text_config",
    "tie_word_embeddings",
    "quantization_config",
)


def hostile(rng):
    """A value that does not belong where it stands, or nearly does."""
    return rng.choice(
        [
            lambda: None,
            lambda: True,
            lambda: False,
            lambda: 0,
            lambda: -1,
            lambda: 1,
            lambda: rng.randrange(1, 300),
            lambda: 2**31,
            lambda: 2**63,
            lambda: 10**18,
            lambda: 10**400,
            lambda: -(10**400),
            lambda: 1e308,
            lambda: float("inf"),
            lambda: float("nan"),
            lambda: 4096.0,
            lambda: "4096",
            lambda: "",
            lambda: "\x00\x1b[31m\n",
            lambda: "a" * 5000,
            lambda: [],
            lambda: {},
            lambda: [1, "2", None],
            lambda: {"a": {"b": [{}] * 50}},
            lambda: [[[[[[]]]]]],
            lambda: list(range(1000)),
            lambda: rng.choice(list(FAMILIES)),
            lambda: 2**22,
        ]
    )()


def mutated(rng):
    """A published configuration with some fields lost, replaced, added or swapped."""
    config = copy.deepcopy(KNOWN[rng.choice(list(KNOWN))])
    for _ in range(rng.randrange(1, 5)):
        key = rng.choice(list(config) or ["model_type"])
        action = rng.randrange(5)
        if action == 0:
            config.pop(key, None)
        elif action == 1:
            config[rng.choice(OPTIONAL)] = hostile(rng)
        elif action == 2:
            config["model_type"] = rng.choice([*FAMILIES, hostile(rng)])
        else:
            config[key] = hostile(rng)
    return config


def damaged(rng, data):
    """The same bytes with some of them lost or replaced."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            del data[at : at + rng.randrange(1, 20)]
        else:
            data[at : at + 1] = rng.choice([b"\x00", b"\xff", b"{", b"}", b"[" * 100, b'"', b"9" * 30, b"-", b"e999"])
        if not data:
            return b""
    return bytes(data)


def sentence(error):
    """One printable line of a bearable length."""
    text = str(error)
    assert text.isprintable(), text
    assert 10 < len(text) < 700, text


def test_thousands_of_configurations():
    rng = random.Random(SEED)
    priced = refused = 0
    for i in range(CONFIGS):
        data = json.dumps(mutated(rng)).encode()
        if i % 4 == 0:
            data = damaged(rng, data)
        start = time.process_time()
        try:
            content = parse_json(data, "config.json")
            if not isinstance(content, dict):
                continue
            assert estimate(content, "adamw-8bit", seq=64 * (i % 3)).parameters >= 0
            priced += 1
        except InputError as error:
            sentence(error)
            refused += 1
        assert time.process_time() - start < SLOWEST_SECONDS, data[:500]
    # Both ways have to be taken often, or the test tests nothing.
    assert priced > CONFIGS // 20
    assert refused > CONFIGS // 4


def test_the_command_line_ends_with_a_code_and_a_sentence(tmp_path, capsys):
    rng = random.Random(SEED + 1)
    path = tmp_path / "config.json"
    codes = set()
    for i in range(200):
        data = json.dumps(mutated(rng)).encode()
        path.write_bytes(damaged(rng, data) if i % 2 else data)
        code = main(["estimate", str(path), "--optim", "adamw-8bit", "--gpu", "24GiB", "--seq", "64"])
        out, err = capsys.readouterr()
        codes.add(code)
        if code == 2:
            assert err.startswith("memopt estimate: ")
            assert err.count("\n") == 1
            assert not out
        else:
            assert "GiB" in out
            assert not err
    assert codes == {0, 1, 2}
