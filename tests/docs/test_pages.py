"""README and docs: code blocks run, command lines parse, links lead somewhere, the reference has every public name."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
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
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"]+)\"")
#: Fenced blocks by language. What has none is a terminal's: command lines parse, scripts are there.
FENCE = re.compile(r"^( *)```([\w+-]*)\n(.*?)^\1```$", re.M | re.S)
SCRIPT = re.compile(r"^ *(?:\$ )?python3? ((?:examples|benchmarks)/\w+\.py)([^\n|]*)", re.M)
MAKE = re.compile(r"\bmake ([a-z]+)\b")
#: A name of the package with the module that it stands in.
DOTTED = re.compile(r"\b(?:memopt|estimators)(?:\.[A-Za-z_]\w*)+")
#: Files and schemas that read like one.
NO_NAMES = re.compile(r"\b[\w.-]*/[\w./-]*|\bmemopt\.(?:[a-z-]+/\d|\w+\.(?:json|jsonl|fish)\b)")
SCHEMA = re.compile(r'"(memopt\.[a-z-]+/\d+)"')
#: All that people read, in any folder.
EVERY = [*PAGES, *sorted(p for p in ROOT.glob("*.md") if p.name != "README.md"), ROOT / "llms.txt"]
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


def fences(page):
    return [(m[2], textwrap.dedent(m[3])) for m in FENCE.finditer(page.read_text())]


@pytest.mark.parametrize("page", EVERY, ids=name)
def test_no_block_is_of_a_kind_that_nothing_looks_at(page):
    found = fences(page)
    assert {language for language, _ in found} <= {"python", "diff", ""}
    if page in PAGES:  # the others have no namespace
        assert sum(language == "python" for language, _ in found) == len(blocks(page))
    else:
        assert "python" not in {language for language, _ in found}


@pytest.mark.parametrize("page", [p for p in EVERY if any(k == "diff" for k, _ in fences(p))], ids=name)
def test_both_sides_of_a_diff_are_python(page):
    """They need a framework: tests/training/test_frameworks.py and tests/distributed have them in full."""
    for language, text in fences(page):
        if language == "diff":
            for gone in "+-":
                side = [line[1:] for line in text.splitlines() if not line.startswith(gone)]
                compile("\n".join(side).replace("…", "..."), name(page), "exec", ast.PyCF_ONLY_AST)


def resolves(dotted):
    first, *rest = dotted.split(".")
    found = import_module(first)
    for i, part in enumerate(rest, 1):
        found = getattr(found, part, None) or import_or_none(".".join([first, *rest[:i]]))
        if found is None:
            return False
    return True


def import_or_none(dotted):
    try:
        return import_module(dotted)
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("page", EVERY, ids=name)
def test_names_of_the_package_exist(page):
    text = NO_NAMES.sub(" ", page.read_text())
    assert [dotted for dotted in sorted(set(DOTTED.findall(text))) if not resolves(dotted)] == []


@pytest.mark.parametrize("page", [p for p in EVERY if SCRIPT.search(p.read_text())], ids=name)
def test_scripts_that_are_named_are_there(page):
    for script, words in SCRIPT.findall(page.read_text()):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"(?<=\s)--[a-z-]+", words.partition("#")[0]):
            assert f'"{flag}"' in source, f"{script} {flag}"


@pytest.mark.parametrize("page", EVERY, ids=name)
def test_make_has_the_targets_that_are_named(page):
    code = re.findall(r"`([^`\n]+)`|^    (\S[^\n]*)$", page.read_text(), re.M)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {t for pair in code for t in MAKE.findall(" ".join(pair))} <= {*targets, "help"}


@cache
def parser(verb):
    made = ArgumentParser(prog=verb, exit_on_error=False)
    import_module(f"memopt.cli.{verb.replace('-', '_')}").add_arguments(made)
    return made


@pytest.mark.parametrize("page", [p for p in PAGES if COMMAND.search(p.read_text())], ids=name)
def test_command_lines_parse(page):
    parsed = 0
    for match in COMMAND.finditer(page.read_text()):
        for line in re.split(r"\s{3,}", match[1]):  # two in a row, or a remark
            words = shlex.split(line, comments=True)
            if words and words[0] == "memopt" and "…" not in line and "..." not in line:
                parser(words[1]).parse_args(words[2:])
                parsed += 1
    assert parsed or "…" in page.read_text()


def anchors(page):
    """As MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def links(text):
    return [a or b for a, b in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]


@pytest.mark.parametrize("page", [*EVERY, *sorted((ROOT / "benchmarks" / "results").glob("*.md"))], ids=name)
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
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
    listed = re.findall(r"^::: (\S+)$", page, re.M)
    assert len(listed) == len(set(listed))
    assert all(map(resolves, listed))


@pytest.mark.parametrize("package", ["memopt.checkpoint", "memopt.diagnosis"])
def test_the_reference_has_what_these_functions_return(package):
    page = (DOCS / "reference" / "memopt.md").read_text()
    for public in set(import_module(package).__all__) - set(memopt.__all__):
        assert f"### `{package}.{public}`\n\n::: {package}.{public}\n" in page, public


def test_the_reference_has_every_name_that_a_page_imports():
    reference = "".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))
    how = [p for p in PAGES if p.parent.name != "reference" and p.name not in ("design.md", "extending.md")]
    used = {m for p in how for m in re.findall(r"from ((?:memopt|estimators)\.[\w.]+) import (\w+)", p.read_text())}
    used = {".".join(pair) for pair in used} | {d for p in how for d in DOTTED.findall(NO_NAMES.sub("", p.read_text()))}
    deep = {d for d in used if d.count(".") > 1 and d.split(".")[1] not in memopt.__all__}
    assert [d for d in sorted(deep) if f"::: {d}\n" not in reference and not inspect.ismodule(import_or_none(d))] == []


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


def test_links_of_the_package_index_are_absolute(tmp_path):
    """There nothing stands beside the README. The wheel of a source distribution has them from its PKG-INFO."""
    pytest.importorskip("setuptools")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    line = [sys.executable, "setup.py", "-q", "--long-description"]
    for kept, env in ((False, {"MEMOPT_REPOSITORY": "https://example.org/memopt/"}), (True, {})):
        if kept:
            (tmp_path / "PKG-INFO").write_text("Project-URL: Source, https://example.org/memopt\n")
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **env})
        found = links(done.stdout)
        assert len(found) == len(links((ROOT / "README.md").read_text())), done.stderr
        assert all(link.startswith("https://example.org/memopt/") for link in found)
        assert "https://example.org/memopt/raw/v0.1.0/docs/images/demo.svg" in found
