"""README and docs: code blocks run, command lines parse, links lead somewhere, the reference has every public name."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import estimators
import memopt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "examples" / "recipes.md"]
#: A block that cannot run here says why on the line before it: <!-- not run: needs a GPU -->
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n\n?)?^```python\n(?P<code>.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^(?:\$ |    )(memopt .*)", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SCHEMA = re.compile(r'"(memopt\.[a-z-]+/\d+)"')
#: Blocks that may go unrun, over all pages.
MOST_SKIPPED = 8


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    return [(m["code"], m["why"]) for m in BLOCK.finditer(page.read_text())]


class Net(nn.Module):
    """What the pages mean by ``model``: an embedding, two matrices, a norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.block = nn.ModuleDict({"up": nn.Linear(64, 128), "norm": nn.LayerNorm(128)})
        self.head = nn.Linear(128, 64)

    def forward(self, tokens):
        return self.head(self.block["norm"](self.block["up"](self.embed(tokens))))


def names(folder):
    """One namespace for a page: a model, what is fed to it, and an optimizer that has stepped."""
    model = Net()
    inputs = torch.randint(64, (4, 8))
    opt = memopt.create(model, "adamw-8bit", lr=1e-3)
    model(inputs).square().mean().backward()
    opt.step()
    opt.zero_grad()
    scheduler = memopt.schedule(opt, "constant")
    loss = model(inputs).square().mean()
    data = [inputs, inputs]
    return {"torch": torch, "memopt": memopt} | {key: value for key, value in locals().items() if key != "folder"}


@pytest.mark.parametrize("page", [p for p in PAGES if any(not why for _, why in blocks(p))], ids=name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = names(tmp_path)
    for code, why in blocks(page):
        if why is None:
            exec(compile(code, name(page), "exec"), made)


def test_few_blocks_are_not_run():
    assert sum(why is not None for page in PAGES for _, why in blocks(page)) <= MOST_SKIPPED


@cache
def parser(verb):
    made = ArgumentParser(prog=verb, exit_on_error=False)
    import_module(f"memopt.cli.{verb.replace('-', '_')}").add_arguments(made)
    return made


@pytest.mark.parametrize("page", [p for p in PAGES if COMMAND.search(p.read_text())], ids=name)
def test_command_lines_parse(page):
    for match in COMMAND.finditer(page.read_text()):
        for line in re.split(r"\s{3,}", match[1]):  # two in a row, or a remark
            words = shlex.split(line, comments=True)
            if words and words[0] == "memopt" and "…" not in line and "..." not in line:
                parser(words[1]).parse_args(words[2:])


def anchors(page):
    """As MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("package", [memopt, estimators], ids=lambda p: p.__name__)
def test_the_reference_has_every_public_name(package):
    page = (DOCS / "reference" / f"{package.__name__}.md").read_text()
    for public in package.__all__:
        where = package._PUBLIC[public]
        assert f"### `{package.__name__}.{public}`\n\n::: {where}.{public}\n" in page, public
        assert inspect.getdoc(getattr(package, public)), public
    assert page.count(":::") == len(package.__all__)


def test_the_reference_has_every_schema():
    page = (DOCS / "reference" / "json.md").read_text()
    sources = [p.read_text() for folder in ("memopt", "estimators") for p in (ROOT / folder).rglob("*.py")]
    found = {schema for text in sources for schema in SCHEMA.findall(text)}
    assert len(found) > 8
    assert [schema for schema in sorted(found) if f"`{schema}`" not in page] == []


def test_the_reference_has_every_verb():
    from memopt.cli import VERBS

    page = (DOCS / "reference" / "cli.md").read_text()
    assert [verb for verb in VERBS if f"`memopt {verb}`" not in page] == []


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")]
    assert [p for p in pages if f": {p}\n" not in site] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """What ``make docs`` does, where its packages are installed: a link that leads nowhere ends it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tour" / "index.html").exists()
