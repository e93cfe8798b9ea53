"""The command line. One verb, one module: it has ``SUMMARY``, ``add_arguments(parser)`` and ``run(args)``, which
returns the exit code. A verb's module is imported only when the verb is used, so that ``memopt estimate`` starts at
once.

Exit codes of every verb: 0 done, 1 the answer is no (does not fit, not found), 2 the input cannot be used, 130
interrupted by Ctrl-C. Where the reader of a pipe has gone (``memopt list | head``) the code is 0.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from estimators.report.lines import wrap
from memopt.cli.output import terminal

#: verb -> one line for ``memopt --help``
VERBS = {
    "estimate": "what a model and its optimizer state will cost, before anything is allocated",
    "plan": "the configurations that fit a card, the gentlest first",
    "solve": "the largest batch, sequence, rank or model that fits a card, or the fewest GPUs",
    "web": "the calculator as a page, on this machine or as static files",
    "measure": "run a training script, and record its memory by phase",
    "list": "the specs that exist, and the values on each axis; published recipes",
    "train": "train a small language model on a text file or folder, once for each spec given",
    "lr-find": "the range of rates at which a small language model on your text learns, and a plot of it",
    "schedule": "the learning rate that a schedule gives at every step, and a plot of it",
    "convert": "optimizer state of a checkpoint or of another tool under another spec",
    "inspect": "what is in a checkpoint, and whether its numbers are healthy",
    "bench": "time one optimizer step on this CPU against torch and the other libraries",
    "doctor": "what this machine offers, and what is missing",
    "completion": "completion of verbs, flags and values for bash, zsh or fish",
}


class _Formatter(RawDescriptionHelpFormatter):
    """With a width of its own: to ask the terminal for one, argparse imports shutil, bz2 and lzma, for every flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal.columns())


class _Parser(ArgumentParser):
    """Refuses in one sentence, as verbs do, without the list of all flags; numbers by what they may be."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", int, _whole)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        from memopt.untrusted.text import printable_lines

        self.exit(2, f"{self.prog}: {printable_lines(message)} ({self.prog} --help says more)\n")


def _whole(text: str) -> int:
    with suppress(ValueError):
        return int(text)
    raise ArgumentTypeError(f"{text!r} is not allowed; it is a whole number")


def _number(text: str) -> float:
    with suppress(ValueError):
        return float(text)
    raise ArgumentTypeError(f"{text!r} is not allowed; it is a number")


def _filled(text: str) -> str:
    """Paragraphs of a description as wide as the help; examples, which are indented, as they are."""
    return "\n\n".join(
        part if part.startswith(" ") else "\n".join(wrap(part, terminal.columns()))
        for part in text.strip().split("\n\n")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, by default that of the process, and returns its exit code.

    Args:
        argv: The words after ``memopt``.

    Raises:
        SystemExit: from argparse, after ``--help`` (0) and after a command line that it refuses (2).
    """
    terminal.never_refuse()
    if argv is not None:
        return _code(argv)
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's; nothing here uses it
    code = _code(sys.argv[1:])
    _end_at_once(code)
    return code


def _end_at_once(code: int) -> None:
    """The answer is out, and the process is this command line's: an interrupt while the interpreter is taken down,
    which takes a while with torch, ends it without a word and with the same code."""
    import atexit
    import signal

    with suppress(ValueError):  # in a thread
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _code(words: Sequence[str]) -> int:
    arguments = [*words]  # the verb `list` hides the builtin here
    verb = arguments[0] if arguments else ""
    try:
        try:
            return _run(verb, arguments[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a reader that has gone, or a full disk, is seen here and not at the exit
    except BrokenPipeError:
        _discard_output()
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        # Errors of these kinds are written for the person at the keyboard; a defect of ours still shows its trace.
        from memopt.untrusted.text import printable_lines

        if isinstance(error, OSError):
            _discard_output()
        text = _sentence(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
        print(f"memopt {verb}: {printable_lines(text)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _sentence(error: BaseException) -> str:
    """Of an error of the system without its number: the file and what is the matter with it."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        return f"{error.filename!r}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


def _discard_output() -> None:
    """What is still buffered cannot be written: the interpreter's own flush at exit would complain."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _run(verb: str, arguments: Sequence[str]) -> int:
    if verb in VERBS:
        module = import_module(f"memopt.cli.{verb.replace('-', '_')}")
        parser = _Parser(prog=f"memopt {verb}", description=_filled(module.__doc__ or ""), formatter_class=_Formatter)
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(arguments)))
    if verb in ("--version", "-V"):
        from memopt import __version__

        print(f"memopt {__version__}")
        return 0
    lines = ["usage: memopt VERB [options]     (memopt VERB --help says more)", ""]
    lines += [f"  {name:<10} {summary}" for name, summary in VERBS.items()]
    if verb in ("", "-h", "--help"):
        print(terminal.folded(lines, hanging=13))
        return 0
    print(f"memopt: unknown verb {verb!r}; the verbs are {', '.join(VERBS)}", file=sys.stderr)
    return 2
