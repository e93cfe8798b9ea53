"""What the form holds, as the flags of the command line: the page and ``memopt estimate`` cannot differ."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from estimators.errors import InputError, shown
from estimators.models.from_config import from_config
from estimators.models.model import Model
from estimators.models.names import plain_name
from estimators.models.resolve import architectures, built_in
from estimators.units import count
from memopt.cli import estimate, plan
from memopt.cli.flags import placement, step
from memopt.untrusted.documents import parse_json

#: Characters of a value, and of a pasted configuration; values of a list.
MOST_TEXT, MOST_CONFIG, MOST_VALUES = 500, 200_000, 32
#: A name for the configuration that was pasted: that of the file it came from.
PASTED = "config.json"
_SWITCHES = tuple(flag.name for flag in step.FLAGS if flag.kind == "switch")
_LISTS = ("optim", "hyper")
#: Of the flags for placements, not ``directory``: a page reads and names no folder of the machine that serves it.
_TEXTS = (
    *("model", "config", "gpu", "world", "weights", "gradients", "seq"),
    *(flag.name for flag in step.FLAGS if flag.kind != "switch"),
    *(name for name in placement.FLAGS if name != "directory"),
)
#: What a plan chooses itself.
PLANNED = ("optim", "hyper", "checkpointing", "accumulate", "release_gradients", "offload_gradients")

PageSettings = dict[str, Any]


def checked(content: Any) -> PageSettings:
    """The settings, without those that are empty. Raises :class:`InputError` for names, kinds and lengths of values
    that the page does not send."""
    if not isinstance(content, dict):
        raise InputError(f"the settings are an object, not {shown(content)}")
    found: PageSettings = {}
    for name, value in content.items():
        if name in _SWITCHES:
            allowed, kind = isinstance(value, bool), "true or false"
        elif name in _LISTS:
            kind = f"a list of up to {MOST_VALUES} texts"
            allowed = isinstance(value, list) and len(value) <= MOST_VALUES and all(_text(one) for one in value)
        elif name in _TEXTS:
            most = MOST_CONFIG if name == "config" else MOST_TEXT
            allowed, kind = _text(value, most), f"text of up to {most:,} characters"
        else:
            raise InputError(f"the setting {shown(name)} is not known")
        if not allowed:
            raise InputError(f"{name}={shown(value)} is not allowed; it is {kind}")
        if value and value != [""]:
            found[name] = value
    return found


def _text(value: Any, most: int = MOST_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= most


def model(settings: Mapping[str, Any]) -> Model | str:
    """The pasted configuration, or else a count or the name of a built-in architecture; never a path or the Hub.
    Raises :class:`InputError`."""
    if "config" in settings:
        content = parse_json(settings["config"].encode("utf-8", errors="replace"), PASTED)
        if not isinstance(content, dict):
            raise InputError(f"{PASTED} holds {shown(content)}, not a JSON object")
        return from_config(content, PASTED)
    text: str = settings.get("model", "").strip()
    if not text:
        raise InputError("which model? a name such as llama-3.1-8b, a parameter count such as 8B, or a config.json")
    if count(text) is not None:
        return text
    found = built_in(text)
    if found is not None:
        return found
    from difflib import get_close_matches

    near = get_close_matches(plain_name(text), architectures(), n=3, cutoff=0.5)
    raise InputError(
        f"{shown(text)} is neither a parameter count such as 8B nor a built-in architecture; "
        + (f"nearest names: {', '.join(near)}" if near else "paste its config.json")
    )


def for_estimate(settings: Mapping[str, Any]) -> Namespace:
    """What ``memopt estimate`` makes of the same flags."""
    return _flags(estimate, [], settings)


def for_plan(settings: Mapping[str, Any]) -> Namespace:
    """What ``memopt plan`` makes of them: a step has the same sequences, and what :data:`PLANNED` names is searched."""
    fixed = {name: value for name, value in settings.items() if name not in PLANNED}
    fixed["gpus"] = fixed.pop("world", "1")
    sequences = step.whole(fixed.get("batch", "1"), "--batch")
    fixed["batch"] = str(sequences * step.whole(settings.get("accumulate", "1"), "--accumulate"))
    return _flags(plan, ["", "--gpu", ""], fixed)


def _flags(verb: Any, argv: list[str], settings: Mapping[str, Any]) -> Namespace:
    parser = ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args(argv)
    for name, value in settings.items():
        if name not in ("model", "config"):
            setattr(args, name, value)
    args.model = model(settings)
    return args


def command(settings: Mapping[str, Any], verb: str = "estimate") -> str:
    """The command line that answers the same."""
    words = ["memopt", verb, PASTED if "config" in settings else settings.get("model", "")]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name in _LISTS:
            words += [flag, *value]
        elif name in _SWITCHES:
            words.append(flag)
        elif name not in ("model", "config"):
            words += [flag, value]
    return shlex.join(words)
