"""What MkDocs does not know: pages link to files of the repository outside ``docs``, and docstrings name things in
Sphinx's way. The files become pages and downloads under ``repository/``."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: What pages link to.
OUTSIDE = ("*.md", "examples/*", "benchmarks/results/*")
_LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)")
_ROLE = re.compile(r":(?:py:)?(?:func|class|mod|meth|data|attr|exc):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.name != "README.md" and path.suffix != ".pyc":
                name = f"repository/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, to where the files are in the site."""
    source = page.file.src_uri
    here = source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2]))
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return link[1] + posixpath.relpath(inside, posixpath.dirname(source) or ".")

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub("", html)
