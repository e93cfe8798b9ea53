"""A script that completes verbs, flags, specs, architectures, cards and files when Tab is pressed.

    eval "$(memopt completion bash)"                      in ~/.bashrc
    eval "$(memopt completion zsh)"                       in ~/.zshrc, after compinit
    memopt completion fish > ~/.config/fish/completions/memopt.fish

It needs shtab, which is small and needs nothing else (pip install shtab). Where a clone can time a step, the flags of
memopt bench are those of its benchmark and are not completed.
"""

from __future__ import annotations

import shlex
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any

from memopt.core.extras import require

SUMMARY = "completion of verbs, flags and values for bash, zsh or fish"

SHELLS = ("bash", "zsh", "fish")
#: Tools of memopt convert, whose own list imports torch: too slow for the start of a shell.
TOOLS = ("torch", "dcp", "deepspeed", "transformers", "bitsandbytes", "torchao", "flashoptim")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(args: Namespace) -> int:
    shtab = require("shtab", "memopt completion")
    print(shtab.complete(command_line(), args.shell))
    return 0


class _Offering(ArgumentParser):
    """Offers values for every argument that a verb adds. Nothing is parsed with it: what is offered is not all that is
    allowed."""

    def add_argument(self, *names: Any, **options: Any) -> Action:
        action = super().add_argument(*names, **options)
        if action.choices is None and action.nargs != 0:
            offer(action)
        return action


def command_line() -> ArgumentParser:
    """The verbs, each with its arguments, as one parser."""
    from memopt.cli import VERBS

    parser = ArgumentParser(prog="memopt")
    parser.add_argument("-V", "--version", action="version", help="print the version")
    verbs = parser.add_subparsers(parser_class=_Offering)
    for verb, summary in VERBS.items():
        one = verbs.add_parser(verb, help=summary, description=summary)
        if verb != "bench":  # its flags are a benchmark's, which imports torch: too slow for the start of a shell
            import_module(f"memopt.cli.{verb.replace('-', '_')}").add_arguments(one)
    return parser


def offer(action: Action) -> None:
    """Values to offer for an argument: those of its name, or files where it takes one."""
    import shtab

    metavar = str(action.metavar)
    if action.dest == "model":
        from estimators.models.resolve import architectures

        action.complete = _names_and_files("architecture", architectures())  # type: ignore[attr-defined]
    elif values := _values(action.dest, metavar):
        action.choices = values
    elif metavar in ("FOLDER", "DIR"):
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif metavar in ("FILE", "PATH", "IN", "OUT") or "SCRIPT" in metavar:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


@cache
def _values(name: str, metavar: str) -> tuple[str, ...]:
    from estimators.training import CHOICES

    if name in _OWN:
        return tuple(_OWN[name]())
    if metavar == "DTYPE":
        return ("bf16", "fp16") if name == "mixed" else ("bf16", "fp32", "fp16")
    return tuple(filter(None, CHOICES.get(name, ())))


def _gpus() -> Iterable[str]:
    from estimators.hardware import GPUS

    return GPUS


def _recipes() -> Iterable[str]:
    from memopt.recipes import PUBLISHED

    return PUBLISHED


def _schedules() -> Iterable[str]:
    from memopt.training.schedules import KINDS

    return KINDS


@cache
def _specs() -> tuple[str, ...]:
    """Rules and their formats. What may follow (@PLACEMENT, /PARTITION) is for memopt list: it would be thousands."""
    from memopt.spec import specs

    return tuple(str(s) for s in specs() if (s.master, s.placement, s.partition) == ("none", "device", "none"))


#: Argument -> what it may be; other arguments have the calculator's own lists.
_OWN: dict[str, Callable[[], Iterable[str]]] = {
    "checkpointing": lambda: ("none", "full", "selective", "selective-2", "every-2", "every-4"),
    "emit": lambda: ("accelerate", "deepspeed", "transformers", "python"),
    "engine": lambda: ("native", "bitsandbytes"),
    "gpu": _gpus,
    "kind": _schedules,
    "largest": lambda: ("batch", "seq", "lora", "parameters", "layers-trained"),
    "lora_targets": lambda: ("all-linear", "attention", "default"),
    "names": _recipes,
    "offload_gradients": lambda: ("false", "early", "true"),
    "optim": _specs,
    "reference_model": lambda: ("same",),
    "smallest": lambda: ("gpus", "gpu"),
    "to": lambda: (*TOOLS, *_specs()),
}


def _names_and_files(what: str, names: Iterable[str]) -> dict[str, Any]:
    """shtab's form of a completion: some names, and files."""
    words, function = shlex.join(names), f"_memopt_{what}"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}\n',
            "zsh": f"{function}() {{\n  _alternative '{what}:{what}:({words})' 'files:file:_files'\n}}\n",
            "fish": f"function {function}\n  printf '%s\\n' {words}\n  __fish_complete_path (commandline -ct)\nend\n",
        },
    }
