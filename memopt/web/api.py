"""What the page may ask, as JSON. The local server and Pyodide call :func:`respond` and nothing else.

=========== =========================================== ================================================
question    body                                        answer
=========== =========================================== ================================================
``choices`` ``{}``                                      names and flags that the form offers
``estimate`` settings                                   ``estimate``: ``memopt.estimate/1``; ``view``; ``command``
``plan``    settings with a card                        ``plan``: ``memopt.plan/1``; ``view``
``emit``    settings, with ``kind``                     ``text``: what ``memopt estimate --emit KIND`` prints
=========== =========================================== ================================================

What cannot be used is ``{"error": one sentence}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from estimators.errors import InputError, shown
from memopt.cli.estimate import DEEPSPEED_SPECS, DEFAULT_SPECS, SHARDED_SPECS, estimated
from memopt.cli.flags import placement, step
from memopt.untrusted.documents import parse_json
from memopt.untrusted.text import printable
from memopt.web.settings import checked, command, for_estimate, for_plan

#: Bytes of a question.
MOST_NBYTES = 1_000_000


def respond(question: str, body: bytes) -> tuple[int, str]:
    """``(HTTP status, JSON text)`` of the answer to a question."""
    status, answer = _answer(question, body)
    return status, json.dumps(answer)


def _answer(question: str, body: bytes) -> tuple[int, dict[str, Any]]:
    if question not in QUESTIONS:
        return 404, {"error": f"{shown(question)} is no question; the questions are {', '.join(QUESTIONS)}"}
    if len(body) > MOST_NBYTES:
        return 413, {"error": f"the question has {len(body):,} bytes; at most {MOST_NBYTES:,} are read"}
    try:
        return 200, QUESTIONS[question](parse_json(body, "the question"))
    except (ValueError, ImportError) as error:  # sentences for the person at the page
        return 400, {"error": printable(str(error), 600)}
    except Exception as error:  # a defect of ours: the page goes on, and the trace is where the server was started
        sys.excepthook(*sys.exc_info())
        return 500, {"error": f"a defect of memopt ({type(error).__name__}); the trace is where memopt web was started"}


def _choices(content: Any) -> dict[str, Any]:
    from estimators.hardware import GPUS
    from estimators.models.resolve import architectures
    from estimators.training import CHECKPOINTINGS
    from estimators.units import gib
    from memopt.cli.output.emit import KINDS
    from memopt.version import __version__

    return {
        "version": __version__,
        "models": list(architectures()),
        "cards": [{"name": name, "text": gib(mib * 2**20)} for name, mib in GPUS.items()],
        "specs": list(DEFAULT_SPECS),
        "sharded": list(SHARDED_SPECS),
        "deepspeed": list(DEEPSPEED_SPECS),
        "checkpointing": list(CHECKPOINTINGS),
        "emit": list(KINDS),
        "flags": [flag._asdict() for flag in step.FLAGS]
        + [
            {"name": name, "kind": "text", "metavar": metavar, "help": text}
            for name, (metavar, text) in placement.FLAGS.items()
            if name != "directory"
        ],
    }


def _estimate(content: Any) -> dict[str, Any]:
    from memopt.web.view import estimate_view

    settings = checked(content)
    result = estimated(for_estimate(settings))
    return {"estimate": result.to_json(), "view": estimate_view(result), "command": command(settings)}


def _plan(content: Any) -> dict[str, Any]:
    from memopt.cli.plan import as_json, planned
    from memopt.web.view import plans_view

    settings = checked(content)
    if "gpu" not in settings:
        raise InputError("a plan needs a card")
    result = planned(for_plan(settings))
    return {"plan": as_json(result), "view": plans_view(result, settings)}


def _emit(content: Any) -> dict[str, Any]:
    from memopt.cli.output.emit import emit

    kind = content.pop("kind", None) if isinstance(content, dict) else None
    settings = checked(content)
    if not isinstance(kind, str):
        raise InputError(f"kind={shown(kind)} is not allowed; it is text")
    args = for_estimate(settings)
    args.emit = kind
    return {"text": emit(kind, estimated(args))}


QUESTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "choices": _choices,
    "estimate": _estimate,
    "plan": _plan,
    "emit": _emit,
}
