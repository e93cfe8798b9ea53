"""What MkDocs does not know: pages link to files of the repository outside ``docs``, and docstrings name things in
Sphinx's way. The files become pages and downloads under ``repository/``, the notebook becomes the page ``tour.md``."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: What pages link to.
OUTSIDE = ("*.md", "examples/*", "benchmarks/*.py", "benchmarks/results/*")
_LINK = re.compile(r"(\]\()(?![a-z]+:|/)([^)#\s]+)")
_ROLE = re.compile(r":(?:py:)?(?:func|class|mod|meth|data|attr|exc):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.name != "README.md" and path.suffix != ".pyc":
                name = f"repository/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    page, pictures = notebook(ROOT / "examples" / "tour.ipynb")
    files.append(File.generated(config, "tour.md", content=page))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook's cells and outputs as Markdown, and its pictures by file."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "]("))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"images/tour-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![]({name})")
            else:
                text = output["text"] if output["output_type"] == "stream" else data["text/plain"]
                parts.append("```text\n" + "".join(text).rstrip() + "\n```")
    where = f"*This page is the notebook [examples/{path.name}](repository/examples/{path.name}), as it was run.*"
    return "\n\n".join([parts[0], where, *parts[1:]]) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, to where the files are in the site."""
    source = page.file.src_uri
    here = source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[2]))
        if target.startswith("docs/") and here.startswith("docs/"):
            return link[0]
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return link[1] + posixpath.relpath(inside, posixpath.dirname(source) or ".")

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub("", html)
