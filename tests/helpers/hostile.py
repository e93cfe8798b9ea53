"""What people did to files of checkpoints: pickles, headers, manifests, made one by one."""

import json
import struct
import zipfile

from memopt.checkpoint.io import manifest

STOP = b"."


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name(full: str) -> bytes:
    """A class or function by its name, as protocol 2 has it."""
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    content = value.to_bytes(max((value.bit_length() + 8) // 8, 1), "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(full: str, *arguments: bytes) -> bytes:
    return name(full) + b"(" + b"".join(arguments) + b"t" + b"R"


def storage(numel: int, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(numel: int = 1, offset: int = 0, size=(1,), stride=(1,), stored: int = 1, **where) -> bytes:
    arguments = (storage(stored, **where), number(offset), numbers(*size), numbers(*stride), b"\x89", b"}")
    return call("torch._utils._rebuild_tensor_v2", *arguments)


def torch_file(path, pickle: bytes, storages=None, compression=zipfile.ZIP_STORED):
    """A file as torch.save writes it, with this pickle; ``storages``: key -> bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickle + STOP)
        archive.writestr("archive/byteorder", "little")
        for key, content in (storages or {"0": bytes(4)}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


def state_dict(state: bytes, params: bytes = b"](K\x00e", more: bytes = b"") -> bytes:
    """The pickle of an AdamW's dictionary whose one parameter has ``state``, a pickled dictionary's items."""
    group = {"lr": b"G?PbM\xd2\xf1\xa9\xfc", "eps": b"G>Ey\x8e\xe20\x8c:", "weight_decay": b"K\x00"}
    items = b"".join(text(key) + value for key, value in group.items())
    items += text("betas") + b"G?\xec\xcc\xcc\xcc\xcc\xcc\xcdG?\xef\xf7\xce\xd9\x16\x87+\x86"
    items += b"".join(text(key) + b"\x89" for key in ("amsgrad", "maximize")) + text("decoupled_weight_decay") + b"\x88"
    items += text("params") + params + more
    states = b"}(K\x00}(" + state + b"uu"
    return b"}(" + text("state") + states + text("param_groups") + b"](}(" + items + b"ueu"


def safetensors_file(path, header, data: bytes = b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return path


def resealed(checkpoint, change):
    """The manifest of a checkpoint after ``change(body)``, with the checksum of what it now says."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_bytes(manifest.dump(body))
    return checkpoint
