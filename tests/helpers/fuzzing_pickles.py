"""Pickles and the archives that torch.save writes, changed where their structure says; any bytes, changed blindly."""

from __future__ import annotations

import io
import itertools
import pickletools
import random
import struct
import zipfile

from tests.helpers import hostile

VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    256,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
    10**30,
    10**4000,
    -(2**63),
)
NUMBERS = (0.5, -0.0, 1e308, float("inf"), float("nan"))
TEXTS = (
    *(
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "../../etc/passwd",
        "a/b",
        "..\\x",
        "x\ny",
        "\x1b[2J",
        "\x9b31m",
        "\u202e",
        "\ud800",
    ),
    *(
        "a" * 300,
        "weight",
        "bias",
        "step",
        "exp_avg",
        "float32",
        "F32",
        "bool",
        "8bit",
        "adamw",
        "adamw-8bit@disk/zero3",
    ),
    *("model.safetensors", "$tensor", "-1", "1e999", "%s%n", "*" * 50, "[" * 50),
)
NAMES = (
    *("os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.bytearray"),
    *("_codecs.encode", "torch.load", "torch.hub.load", "torch.storage._load_from_bytes", "subprocess.Popen"),
    *(
        f"torch._utils._rebuild_{what}"
        for what in ("sparse_tensor", "meta_tensor_no_storage", "qtensor", "wrapper_subclass")
    ),
    *("numpy.core.multiarray._reconstruct", "pathlib.PosixPath", "collections.OrderedDict", "collections.Counter"),
    *(
        "collections.defaultdict",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.FloatStorage",
        "functools.partial",
    ),
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("Metadata", "MetadataIndex")),
    *("deepspeed.utils.tensor_fragment.fragment_address", "torchao.optim.subclass_8bit.OptimState8bit"),
)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data))
        how = rng.randrange(6)
        if how == 0:
            del data[at:]
        elif how == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at : at + 8] = rng.choice(VALUES[6:12]).to_bytes(8, "little")
        elif how == 3:
            data[at:at] = bytes(rng.choice((1, 7, 4096)))
        elif how == 4:
            del data[at : at + rng.choice((1, 4, 100))]
        else:
            begin = rng.randrange(len(data))
            data[at:at] = data[begin : begin + rng.choice((1, 16, 300))]
    return bytes(data)


def operations(content: bytes) -> list[bytes]:
    begins = [at for _, _, at in pickletools.genops(content)]
    return [content[a:b] for a, b in itertools.pairwise([*begins, len(content)])]


def some_operation(rng: random.Random) -> bytes:
    return rng.choice(
        (
            lambda: hostile.number(rng.choice((0, 1, -1, 4, 2**31, 2**62, 2**63, 10**30))),
            lambda: hostile.text(rng.choice(TEXTS[:-4]).encode("utf-8", "ignore").decode()),
            lambda: hostile.name(rng.choice(NAMES)),
            lambda: hostile.call(rng.choice(NAMES), *(hostile.number(rng.choice((0, 4, 10**11))),) * rng.randrange(4)),
            lambda: b"r" + struct.pack("<I", rng.choice((0, 5, 2**29 - 1, 2**32 - 1))),
            lambda: b"h" + bytes([rng.randrange(256)]),
            lambda: b"\x8d" + (2**40).to_bytes(8, "little"),
            lambda: hostile.tensor(size=(rng.choice((1, 0, 10**11)),), stride=(rng.choice((0, 1)),)),
            lambda: bytes([rng.choice(b"N()]}\x85\x86\x87tldeuasRbQ0\x81\x90\x91\x93\x94.")]),
            lambda: bytes([rng.randrange(256)]),
        )
    )()


def change_pickle(rng: random.Random, content: bytes) -> bytes:
    found = operations(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if len(found) < 3:
            break
        at = rng.randrange(1, len(found))
        how = rng.randrange(6)
        if how == 0:
            del found[at]
        elif how == 1:
            found.insert(at, some_operation(rng))
        elif how == 2:
            found.insert(at, found[rng.randrange(len(found))])
        elif how == 3:
            other = rng.randrange(1, len(found))
            found[at], found[other] = found[other], found[at]
        else:
            found[at] = _like(rng, found[at])
    return b"".join(found)


def _like(rng: random.Random, operation: bytes) -> bytes:
    """Another value of the same kind: a number for a number, a text for a text."""
    if operation[:1] == b"K" and rng.random() < 0.5:
        return b"K" + bytes([(operation[1] + rng.choice((-1, 1))) % 256])
    if operation[:1] in b"KMJ\x8a":
        return hostile.number(rng.choice((0, 1, 2, -1, 255, 2**31, 2**53, 2**62, 2**63, 10**30)))
    if operation[:1] in b"X\x8c":
        return hostile.text(rng.choice(TEXTS).encode("utf-8", "ignore").decode())
    if operation[:1] in b"c":
        return hostile.name(rng.choice(NAMES))
    if operation[:1] == b"G":
        return b"G" + struct.pack(">d", rng.choice(NUMBERS))
    return some_operation(rng)


def change_torch(rng: random.Random, content: bytes) -> bytes:
    """The pickle of a file of torch.save's, its storages, or how it is packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    how = rng.randrange(10)
    if how < 8:
        members[name] = change_pickle(rng, members[name])
    elif how == 8:
        other = rng.choice(list(members))
        members[other] = change_bytes(rng, members[other])
    else:
        members[rng.choice(TEXTS[1:8]).replace("\n", "")] = b"x"
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for key, data in members.items():
            archive.writestr(key, data)
    return file.getvalue()
