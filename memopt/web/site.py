"""The page as static files: the same Python, packed, and Pyodide, which runs it in the browser. No server, and nothing
is sent anywhere. Pyodide's files come from a folder, that of its npm package."""

from __future__ import annotations

import io
import json
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from memopt.web.server import FILES, page_file

#: What Pyodide loads, from the folder of its npm package.
PYODIDE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "pyodide-lock.json", "python_stdlib.zip")
#: The packages that the page runs.
PACKAGES = ("estimators", "memopt")
#: Dates in the archive: the same sources are the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)
_SERVED, _IN_BROWSER = '<html lang="en" data-engine="server">', '<html lang="en" data-engine="pyodide">'


def write(folder: str | Path, pyodide: str | Path) -> dict[str, int]:
    """Write the site into ``folder``, which is made; ``{file: bytes}`` of what was written.

    Raises:
        ValueError: where ``pyodide`` is not the folder of Pyodide's npm package, before anything is written.
    """
    source = Path(pyodide)
    missing = [name for name in PYODIDE if not (source / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(source)!r} has no {', '.join(missing)}; it is to be the folder of Pyodide's npm package: "
            "npm install pyodide, then node_modules/pyodide"
        )
    contents = {name: page_file(name) for name, _ in FILES.values()}
    index = contents["index.html"].decode()
    if index.count(_SERVED) != 1:
        raise RuntimeError("the page does not say once that a server answers it")
    contents["index.html"] = index.replace(_SERVED, _IN_BROWSER).encode()
    contents["worker.js"] = page_file("worker.js")
    contents["memopt.zip"] = packed()
    contents |= {f"pyodide/{name}": (source / name).read_bytes() for name in PYODIDE}
    contents["pyodide/NOTICE.txt"] = _notice(source).encode()
    for name, content in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: len(content) for name, content in contents.items()}


def packed() -> bytes:
    """The Python sources of :data:`PACKAGES` as a zip archive, the same bytes for the same sources."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for package in PACKAGES:
            for name, content in sorted(_sources(files(package), package)):
                target.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def _sources(folder: Any, path: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if entry.is_dir():
            found += _sources(entry, name) if entry.name != "__pycache__" else []
        elif entry.name.endswith(".py"):
            found.append((name, entry.read_bytes()))
    return found


def _notice(source: Path) -> str:
    info = json.loads((source / "pyodide-lock.json").read_bytes()).get("info", {})
    version, python = info.get("version", "of unknown version"), info.get("python", "")
    return (
        f"Pyodide {version} (CPython {python} for WebAssembly), unchanged from its npm package.\n"
        "Pyodide: Mozilla Public License 2.0, https://github.com/pyodide/pyodide\n"
        "CPython: Python Software Foundation License, https://www.python.org\n"
    )
