"""Time and memory of every reader are bounded by the size of what it reads: small files that stand for much."""

import itertools
import os
import pickle
import zipfile

import pytest
import torch
import torch.distributed.checkpoint  # imported before times are taken

import memopt
from memopt.checkpoint.conversion import rewrite  # noqa: F401 - imported before times are taken
from memopt.checkpoint.importers import safe_unpickle
from memopt.cli import convert, estimate, inspect  # noqa: F401
from memopt.untrusted import Refused
from memopt.untrusted.documents import parse_json, parse_yaml
from memopt.untrusted.headers import read_header
from memopt.untrusted.opening import open_regular
from tests.helpers import hostile
from tests.helpers.bounded import at_once  # noqa: F401
from tests.helpers.hostile import call, name, number, state_dict, tensor, text

MODULES = ("torch.distributed.checkpoint.metadata", "collections")


def unfolding(leaf: bytes, wrap, levels: int) -> bytes:
    """Each level holds the one before twice."""
    content = leaf + b"\x94"
    for level in range(levels):
        content += wrap(b"h" + bytes([level])) + b"\x94"
    return content


#: name -> a pickle that stands for more than it is
PICKLES = {
    "a place of the memo far away": b"Nr" + (2**29 - 1).to_bytes(4, "little"),
    "many places far away": b"".join(b"Nr" + (2**32 - 1 - i).to_bytes(4, "little") + b"0" for i in range(1000)) + b"N",
    "a text of 2^40 bytes": b"\x8d" + (2**40).to_bytes(8, "little") + b"x",
    "bytes of 2^62": b"\x8e" + (2**62).to_bytes(8, "little") + b"x",
    "a bytearray of 2^50": b"\x96" + (2**50).to_bytes(8, "little") + b"x",
    "an integer of a megabyte": b"\x8b" + (2**20).to_bytes(4, "little") + bytes(2**20),
    "a frame of 2^60": b"\x95" + (2**60).to_bytes(8, "little") + b"\x8e" + (2**60).to_bytes(8, "little"),
    "tuples of tuples": unfolding(b")", lambda last: last + last + b"\x86", 60),
    "lists of lists": unfolding(b"]", lambda last: b"](" + last + last + b"e", 60),
    "dictionaries": unfolding(b"}", lambda last: b"}(K\x00" + last + b"K\x01" + last + b"u", 60),
    "a key that unfolds": b"}(" + unfolding(b")", lambda last: last + last + b"\x86", 60) + b"Nu",
    "sets in sets": unfolding(b"\x8f", lambda last: b"(" + last + b"\x91", 20),
    "it holds itself": b"]\x94h\x00a",
    "a hundred thousand levels": b"]" * 100_000 + b"a" * 99_999,
    "keys of one hash": b"}(" + b"".join(number(i * (2**61 - 1) + 7) + b"N" for i in range(1, 20_000)) + b"u",
    "bytearray(10^11)": call("builtins.bytearray", number(10**11)),
    "a code that doubles": call("_codecs.encode", text("x"), text("utf-32")),
    "hex of hex": call("_codecs.encode", b"C\x01x", text("hex")),
    "sets without end": b"(" + b"\x8f" * 300_000 + b"t",
    "copies of a shape": text("x" * 50_000) + b"\x94" + b"".join(call("torch.Size", b"h\x00") for _ in range(5000)),
    "a name of a class each time": b"".join(name(f"collections.A{i}") + b"0" for i in range(50_000)) + b"N",
    "copies of attributes": b"}("
    + b"".join(text(f"a{i}") + b"N" for i in range(9000))
    + b"u\x940"
    + (name("collections.A") + b")\x81h\x00b0") * 9000
    + b"N",
}


#: Those that are read, as the little that they are.
HARMLESS = ("a place of the memo far away", "many places far away")


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_stand_for_more(tmp_path, what):
    content = b"\x80\x04" + PICKLES[what] + b"."
    if what in HARMLESS:
        assert safe_unpickle.tree(content, MODULES, "x") is None
        return
    with pytest.raises(Refused):
        safe_unpickle.tree(content, MODULES, "x")
    with pytest.raises(Refused):
        safe_unpickle.unpickled(hostile.torch_file(tmp_path / "x.pt", PICKLES[what]))


#: name -> (what is behind `state[0][...]`, storages) of a file whose tensors cannot be
TENSORS = {
    "one element repeated 10^11 times": (tensor(size=(10**11,), stride=(0,)), None),
    "and in two dimensions": (tensor(size=(10**6, 10**6), stride=(0, 0)), None),
    "behind its storage": (tensor(offset=1), None),
    "overlapping rows": (tensor(size=(3, 3), stride=(1, 1), stored=5), {"0": bytes(20)}),
    "a negative size": (tensor(size=(-1,)), None),
    "a size of 2^62": (tensor(size=(2**62,), stride=(1,)), None),
    "sizes whose product overflows": (tensor(size=(2**32, 2**32), stride=(2**32, 1)), None),
    "no elements of many": (tensor(size=(0, 2**62, 2**62), stride=(1, 1, 1)), None),
    "a negative stride": (tensor(size=(2,), stride=(-1,), offset=1, stored=2), {"0": bytes(8)}),
    "a hundred dimensions": (tensor(size=(1,) * 100, stride=(1,) * 100), None),
    "more elements than bytes": (tensor(size=(10,), stored=10), {"0": bytes(4)}),
    "a storage that is not there": (tensor(key="../../1"), None),
    "a storage without numbers": (tensor(kind="torch.QInt8Storage"), None),
    "the same bytes ten thousand times": (
        b"("
        + tensor(size=(9000,), stored=9000)
        + b"".join(tensor(size=(9000,), stored=9000) for _ in range(2000))
        + b"t",
        {"0": bytes(36_000)},
    ),
    "a meta tensor": (call("torch._utils._rebuild_meta_tensor_no_storage", number(10**12)), None),
    "a sparse tensor": (call("torch._utils._rebuild_sparse_tensor", b"N"), None),
    "a quantised tensor": (call("torch._utils._rebuild_qtensor", b"N"), None),
    "a tensor of numpy": (call("torch._utils._rebuild_device_tensor_from_numpy", b"N"), None),
    "a subclass of torch's": (
        call("torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_wrapper_subclass"), b"N", b")", b"}"),
        None,
    ),
    "an item of a tensor set": (tensor() + b"(K\x00K\x01u", None),
    "attributes of a tensor": (tensor() + b"}b", None),
    "torch.load": (call("torch.load", text("x")), None),
    "os.system": (call("posix.system", text("true")), None),
    "getattr": (call("builtins.getattr", name("torch.Size"), text("__class__")), None),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_cannot_be(tmp_path, run, what):
    value, storages = TENSORS[what]
    items = text("step") + b"K\x01" + text("exp_avg") + value + text("exp_avg_sq") + tensor()
    file = hostile.torch_file(tmp_path / "x.pt", state_dict(items), storages)
    code, out, err = run("inspect", str(file))
    assert (code, out) == (2, "")
    assert "cannot be read without executing what it says, or is damaged" in err


def test_the_file_that_they_are_made_of_is_read(tmp_path, run):
    items = text("step") + b"K\x01" + text("exp_avg") + tensor() + text("exp_avg_sq") + tensor()
    assert run("inspect", str(hostile.torch_file(tmp_path / "x.pt", state_dict(items))))[0] == 0


def test_archives(tmp_path):
    """Compressed ones (a bomb of zeros), one inside another, doubled names, another byte order."""
    good = state_dict(text("step") + b"K\x01")
    bomb = text("x" * 10_000_000)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        hostile.torch_file(tmp_path / "x.pt", bomb, compression=compression)
        with pytest.raises(Refused, match="is compressed"):
            safe_unpickle.unpickled(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", b"\x80\x02N.")
    with pytest.raises(Refused, match="there twice"):
        safe_unpickle.unpickled(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/byteorder", "big")
    with pytest.raises(Refused, match="another byte order"):
        safe_unpickle.unpickled(tmp_path / "x.pt")
    for content in (b"", b"PK", b"PK\5\6" + bytes(18), b"\x80\x02N.", b"PK\3\4" + bytes(100)):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(Refused):
            safe_unpickle.unpickled(tmp_path / "x.pt")
    assert isinstance(safe_unpickle.unpickled(hostile.torch_file(tmp_path / "x.pt", good)), dict)


def one(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "a key twice": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a key of an entry twice": b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "overlap": {"a": one(), "b": one()},
    "half an overlap": {"a": one(shape=[1]), "b": one("F16", [1], [2, 4])},
    "a gap": {"a": one("U8", [1], [0, 1]), "b": one("U8", [1], [3, 4])},
    "bytes behind the end": {"a": one("U8", [2], [0, 2])},
    "behind the file": {"a": one(offsets=[4, 8])},
    "true as an offset": {"a": one("U8", [1], [False, True]), "b": one("U8", [3], [1, 4])},
    "true as a size": {"a": one("F32", [True])},
    "sizes that overflow": {"a": one(shape=[4194305, 4194305, 211106198978564], offsets=[0, 4])},
    "no elements of many": {"a": one(shape=[0, 2**62, 2**62], offsets=[0, 0]), "b": one()},
    "a negative size": {"a": one(shape=[-1, -1])},
    "backwards": {"a": one(shape=[0], offsets=[4, 0])},
    "numbers with a fraction": {"a": one(shape=[1.0])},
    "a million dimensions": {"a": one(shape=[1] * 100_000)},
    "a dtype of no size": {"a": one(dtype="F4", shape=[1])},
    "metadata of another kind": {"__metadata__": {"x": {"y": 1}}, "a": one()},
    "levels": b'{"a":' * 50_000,
    "a list": b"[1,2]",
    "an integer of many digits": b'{"a":' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"\xff":1}',
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("length", [None, 2**63, 10**8])
def test_headers_that_lie(tmp_path, run, what, length):
    path = hostile.safetensors_file(tmp_path / "model.safetensors", HEADERS[what], bytes(4), length)
    with open_regular(path) as file, pytest.raises(Refused, match="or its header is damaged"):
        read_header(file, str(path))
    code, _, err = run("estimate", str(path))
    assert (code, "or its header is damaged" in err) == (2, True)


DOCUMENTS = {
    "levels of lists": b"[" * 200_000,
    "levels of objects": b'{"a":' * 200_000,
    "levels that end": b"[" * 500 + b"]" * 500,
    "digits": b"[" + b"1" * 10_000 + b"]",
    "a key twice": b'{"a": 1, "a": 2}',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("file", ["manifest.json", "config.json", "x.json", ".index.json"])
def test_json(tmp_path, run, what, file):
    (tmp_path / file).write_bytes(DOCUMENTS[what])
    with pytest.raises(Refused):
        parse_json(DOCUMENTS[what], "x")
    commands = [["inspect", str(tmp_path)]] if file == "manifest.json" else [["estimate", str(tmp_path / file)]]
    for command in [*commands, ["estimate", "8B", "--from", str(tmp_path / file)]]:
        code, _, err = run(*command)
        assert code == 2
        assert all(line.isprintable() for line in err.split("\n"))


YAML = {
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
    "an alias to itself": "a: &a [*a]",
    "levels": "[" * 30_000,
    "long": "a: " + "x" * 2**20,
    "python": "a: !!python/object/apply:os.system ['true']",
    "no timestamp": "a: !!timestamp x",
    "no number": "a: !!int x",
    "base 60": "a: " + ":".join(["59"] * 20_000),
    "a list as a key": "? [1, 2]\n: x",
}


@pytest.mark.parametrize("what", YAML)
def test_yaml(tmp_path, run, what):
    pytest.importorskip("yaml")
    (tmp_path / "x.yaml").write_text(YAML[what])
    if what != "base 60":
        with pytest.raises(Refused):
            parse_yaml(YAML[what].encode(), "x")
    assert run("estimate", "8B", "--from", str(tmp_path / "x.yaml"))[0] == 2


def test_metadata_that_names_bytes_again_and_again(tmp_path):
    """Pieces within each other are refused, as is a shape without bytes."""
    metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    properties = metadata.TensorProperties(torch.float32)

    def folder(shape, pieces):
        chunks = [metadata.ChunkStorageMetadata(torch.Size([o, 0]), torch.Size([1, 4])) for o, _, _ in pieces]
        kind = metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        where = {
            metadata.MetadataIndex("k", torch.Size([o, 0])): filesystem._StorageInfo("f", at, n) for o, at, n in pieces
        }
        found = metadata.Metadata({"k": kind}, {"k": ("optimizer", "state", "w", "exp_avg")}, where)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(found))

    (tmp_path / "f").write_bytes(bytes(64))
    for shape, pieces, message in [
        ([10**6, 10**6], [(0, 0, 64)], "too few bytes"),
        ([4, 4], [(i, 0, 64) for i in range(4)], "two pieces have byte"),
        ([4, 4], [(0, 60, 64)], "is truncated"),
        ([4, 4], [(0, -1, 64)], "not whole numbers"),
    ]:
        folder(shape, pieces)
        with pytest.raises(ValueError, match=message):
            memopt.load(tmp_path, optimizer=memopt.create(torch.nn.Linear(2, 2), "adamw"))


def test_means_that_stand_for_terabytes(tmp_path, run):
    """Two vectors are the state of a matrix of any size: what is looked at is what is there, and what is written is
    refused where there is no room for it."""
    side = 10**6
    state = {"step": torch.tensor(1.0), "row_var": torch.ones(side, 1), "col_var": torch.ones(1, side)}
    group = {**torch.optim.Adafactor([torch.zeros(2, 2)]).state_dict()["param_groups"][0], "params": [0]}
    torch.save({"state": {0: state}, "param_groups": [group]}, tmp_path / "x.pt")
    code, out, _ = run("inspect", str(tmp_path / "x.pt"))
    assert (code, "2,000,000 elements in 1 tensors" in out) == (0, True)
    for to in ("adafactor-32bit", "adamw"):
        code, _, err = run("convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", to, "--fill", "exp_avg=0")
        assert code == 2
    assert ("bytes are free" in err or "are free in" in err, (tmp_path / "out").exists()) == (True, False)


def test_devices_have_no_end(run):
    for path in ("/dev/zero", "/dev/full"):
        if os.path.exists(path):
            for command in (["inspect", path], ["estimate", path], ["estimate", "8B", "--from", path]):
                assert run(*command)[0] == 2
