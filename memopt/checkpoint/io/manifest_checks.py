"""Whether what a manifest says of a checkpoint can be true, before anything in it is believed.

Its checksum says that it is what somebody wrote, not that they meant well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite, prod
from typing import Any

from memopt.checkpoint.io.contents import MODEL_FILE, rank_file
from memopt.checkpoint.tensorfile import DTYPES, DamagedFile
from memopt.untrusted import Refused
from memopt.untrusted.headers import MAX_DIMENSIONS, MAX_LENGTH
from memopt.untrusted.names import label
from memopt.untrusted.text import shown

#: Steps, bytes and seeds are whole numbers below this.
_MOST = 2**63
#: Ranks that may have written a checkpoint together.
_MAX_WORLD = 2**20
_CRC = re.compile(r"[0-9a-f]{8}")


def check(body: dict[str, Any], origin: str) -> None:
    """Raise :class:`~memopt.checkpoint.tensorfile.DamagedFile` with the first thing that cannot be."""
    try:
        _check(body)
    except Refused as error:
        raise DamagedFile(f"{origin} is damaged: {error}") from None


def _check(body: dict[str, Any]) -> None:
    _need("step", body, _count)
    world = _need("world_size", body, _world)
    files = _need("files", body, _object)
    possible = {MODEL_FILE} | ({rank_file(rank, world) for rank in range(world)} if world <= len(files) else set())
    for name, info in files.items():
        if name not in possible:
            raise Refused(f"it names the file {shown(name)}, which a checkpoint of {world:,} ranks does not have")
        _need("nbytes", _object(info, name), _count)
        if not _all(info.get("crc32"), lambda crc: isinstance(crc, str) and bool(_CRC.fullmatch(crc))):
            raise Refused(f"the checksums of {name} are {shown(info.get('crc32'))}")
    if possible - files.keys() - {MODEL_FILE} or len(possible) == 1:
        raise Refused(f"world_size={world:,} and files of {len(files):,} ranks are named")
    _need("extra", body, _object)
    if not isinstance(body.get("random"), bool):
        raise Refused(f"random={shown(body.get('random'))} is not true or false")
    if ("model" in body) != (MODEL_FILE in files):
        raise Refused(f"it has {'a' if 'model' in body else 'no'} model, and {MODEL_FILE} is not what that says")
    if "model" in body:
        _check_model(_object(body["model"], "model"), world)
    if "optimizer" in body:
        _check_optimizer(_object(body["optimizer"], "optimizer"), world)


def _check_slabs(name: str, slabs: Any, shape: list[int], world: int) -> None:
    from memopt.checkpoint.state.slabs import refuse

    if reason := refuse(slabs, tuple(shape), world):
        raise Refused(f"the slabs of {name} {reason}")


def _check_model(model: dict[str, Any], world: int) -> None:
    for name, same in _need("tied", model, _object).items():
        label(name, "a tensor of the model")
        label(same, f"the tensor that {name} is tied to")
    for name, spec in _need("sharded", model, _object).items():
        label(name, "a tensor of the model")
        if not isinstance(spec, list) or len(spec) != 2 or spec[0] not in DTYPES.values() or not _is_shape(spec[1]):
            raise Refused(f"{name} of the model is {shown(spec)}, not a dtype and a shape")
    for name, slabs in _object(model.get("slabs", {}), "slabs").items():
        if name not in model["sharded"]:
            raise Refused(f"slabs of {shown(name)}, which is not sharded")
        _check_slabs(name, slabs, model["sharded"][name][1], world)


def _check_optimizer(saved: dict[str, Any], world: int) -> None:
    from memopt.engines import ENGINES
    from memopt.partitions import PARTITIONS

    if _need("world_size", saved, _world) > world:
        raise Refused(f"the optimizer is of {saved['world_size']:,} ranks, and {world:,} wrote the checkpoint")
    for key, allowed in (("engine", ENGINES), ("partition", PARTITIONS)):
        if not isinstance(saved.get(key), str) or saved[key] not in allowed:
            raise Refused(f"{key}={shown(saved.get(key))} is not known; known are {', '.join(allowed)}")
    _need("spec", saved, _text)
    _need("seed", saved, _whole)
    _need("skipped_steps", saved, _count)
    if not isinstance(saved.get("named"), bool):
        raise Refused(f"named={shown(saved.get('named'))} is not true or false")
    _need("hyper", saved, _object)
    if "rules" in saved:
        _need("rules", saved, _object)
    for pattern, override in _need("overrides", saved, _object).items():
        _text(pattern, "a pattern of overrides")
        _text(override, f"the override of {pattern}")
    parameters = _need("parameters", saved, _object)
    for name, entry in parameters.items():
        _check_parameter(label(name, "a parameter"), _object(entry, name))
        if "slabs" in entry:
            _check_slabs(name, entry["slabs"], entry["shape"], saved["world_size"])
    grouped: set[str] = set()
    for i, group in enumerate(_list(saved.get("groups"), "groups")):
        members = _list(_object(group, f"group {i}").get("parameters"), f"the parameters of group {i}")
        for name in members:
            if not isinstance(name, str) or name not in parameters or name in grouped:
                raise Refused(f"group {i} has the parameter {shown(name)}, which is unknown, or in two groups")
            grouped.add(name)
        _need("hyper", group, _object)
    if grouped != parameters.keys():
        raise Refused(f"{shown(next(iter(parameters.keys() - grouped)))} is in no group")


def _check_parameter(name: str, entry: dict[str, Any]) -> None:
    from memopt.checkpoint.state.moment_codes import CODES
    from memopt.masters import MASTERS

    if not _is_shape(entry.get("shape")):
        raise Refused(f"{name} has the shape {shown(entry.get('shape'))}")
    if entry.get("dtype", "float32") not in DTYPES.values():
        raise Refused(f"{name} has the dtype {shown(entry['dtype'])}")
    step = entry.get("step", 0.0)
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not isfinite(step) or not 0 <= step < _MOST:
        raise Refused(f"{name} has taken {shown(step)} steps")
    for moment, code in _object(entry.get("moments", {}), f"the moments of {name}").items():
        label(moment, f"a moment of {name}")
        code = _object(code, f"{name}.{moment}")
        if not isinstance(code.get("format"), str) or not isinstance(code.get("signed"), bool):
            raise Refused(
                f"{name}.{moment} has the format {shown(code.get('format'))}, signed {shown(code.get('signed'))}"
            )
        if code["format"] not in CODES:
            raise Refused(f"{name}.{moment} is stored as {shown(code['format'])}, which this version does not know")
    if "master" in entry and (not isinstance(entry["master"], str) or entry["master"] not in MASTERS):
        raise Refused(f"{name} has a master {shown(entry['master'])}, which this version does not know")


# Values --------------------------------------------------------------------------------------------------------


def _need(key: str, body: dict[str, Any], kind: Callable[[Any, str], Any]) -> Any:
    if key not in body:
        raise Refused(f"it lacks {key}")
    return kind(body[key], key)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{shown(what)} is {shown(value)}, not an object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(f"{what} is {shown(value)}, not a list")
    return value


def _text(value: Any, what: str) -> str:
    return label(value, what)


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or abs(value) >= _MOST**2:
        raise Refused(f"{what}={shown(value)} is not a whole number of up to 126 bits")
    return value


def _count(value: Any, what: str) -> int:
    if not 0 <= _whole(value, what) < _MOST:
        raise Refused(f"{what}={shown(value)} is not a number >= 0")
    return int(value)


def _world(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_WORLD:
        raise Refused(f"{what}={shown(value)} is not a number of ranks, 1 to {_MAX_WORLD:,}")
    return value


def _all(values: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(good, values))


def _is_shape(value: Any) -> bool:
    if not _all(value, lambda n: type(n) is int and 0 <= n <= MAX_LENGTH) or len(value) > MAX_DIMENSIONS:
        return False
    return bool(prod(n for n in value if n) <= MAX_LENGTH)
