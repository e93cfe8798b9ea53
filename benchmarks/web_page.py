"""The calculator page in headless Chromium: pictures at three widths, figures beside the command line's, times, sizes.

    python benchmarks/web_page.py                                    # the local server
    python benchmarks/web_page.py --pyodide node_modules/pyodide     # and the static site, Python in the browser

Figures: the page is given random settings by its link (seeded), and the JSON behind it and the text that it shows are
compared with ``memopt estimate --json``. Written: docs/images/web-*.png and benchmarks/results/web_page.json; a minute
on a quiet machine, several with ``--pyodide``.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from chromium import Page
from provenance import write_result
from web_access import contrast, controls, keyboard

from estimators.models.resolve import architectures
from estimators.units import gib
from memopt.cli import main
from memopt.web import site
from memopt.web.server import Server

ROOT = Path(__file__).parents[1]
WIDTHS = {390: 844, 1280: 900, 1920: 1080}
#: What the pictures show: something fits, something does not, and a plan changes little.
SHOWN = {
    "model": "llama-3.1-8b",
    "gpu": "a100-80gb",
    "world": "1",
    "seq": "4096",
    "batch": "1",
    "accumulate": "1",
    "checkpointing": "full",
    "optim": ["adamw", "adamw-8bit", "adafactor"],
}
SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor", "adamw@paged", "lion-8bit", "adamw-8bit@host", "sgd")
SHARDED = ("adamw/zero1", "adamw-8bit/zero2", "adamw/zero3")
#: Waits in the page for the answer to what the link was changed to.
ASK = """new Promise((done) => {
  document.addEventListener("memopt:answer", ({ detail }) => requestAnimationFrame(() => done({
    ms: performance.now() - begin,
    error: detail.error ?? null, estimate: detail.estimate ?? null, command: detail.command ?? null,
    compare: [...document.querySelectorAll("#compare tbody tr")].map((r) => [...r.cells].map((c) => c.innerText)),
    figures: [...document.querySelectorAll("#figures tbody td")].map((c) => c.innerText),
    shown: document.querySelector("#compare tr.current input")?.value ?? null,
  })), { once: true });
  const begin = performance.now();
  location.hash = %s;
})"""


def settings(rng: random.Random) -> dict[str, object]:
    """Random settings of the page's fields; some contradict each other."""
    world = rng.choice((1, 1, 1, 2, 8))
    specs = (*SPECS, *(SHARDED if world > 1 else ()))
    found: dict[str, object] = {
        "model": rng.choice((*architectures(), *architectures(), "8B", "350M")),
        "gpu": rng.choice(("rtx-4090", "h100", "t4", "24GiB", "a100-80gb")),
        "world": str(world),
        "batch": str(rng.choice((1, 2, 4))),
        "seq": str(rng.choice((128, 512, 1000, 2048))),
        "accumulate": str(rng.choice((1, 1, 2))),
        "checkpointing": rng.choice(("none", "full", "selective", "every-2")),
        "loss": rng.choice(("full", "full", "chunked", "fused")),
        "attention": rng.choice(("sdpa", "sdpa", "flash", "eager")),
        "optim": rng.sample(specs, rng.choice((1, 2, 3))),
    }
    if rng.random() < 0.3:
        found |= {"lora": str(rng.choice((4, 16, 64))), "quantised": rng.choice(("", "nf4", "nf4-double", "int8"))}
    if rng.random() < 0.2:
        found |= rng.choice(({"mixed": "bf16"}, {"release_gradients": True}, {"offload_activations": True}))
    return found


def fragment(one: dict[str, object]) -> str:
    return urlencode({k: "yes" if v is True else v for k, v in one.items() if v}, doseq=True)


def command_line(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def compared(page: Page, count: int, seed: int) -> dict[str, object]:
    """Random settings in the page and on the command line. Exits at the first that differs."""
    rng = random.Random(seed)
    times, refused = [], 0
    for number in range(count):
        asked = settings(rng)
        got = page.evaluate(ASK % json.dumps("#" + fragment(asked)))
        if got["error"] is not None:
            argv = ["estimate", str(asked["model"])]
            for name, value in asked.items():
                if value and name != "model":
                    listed = value if isinstance(value, list) else [] if value is True else [value]
                    argv += [f"--{name.replace('_', '-')}", *map(str, listed)]
            code, _, said = command_line([*argv, "--json"])
            same = code == 2 and got["error"] in " ".join(said.split())
            refused += 1
        else:
            times.append(got["ms"])
            _, verb, *argv = shlex.split(got["command"])
            _, out, _ = command_line([verb, *argv, "--json"])
            said = json.loads(out)
            same = got["estimate"] == said and shown_as_said(got, said)
        if not same:
            raise SystemExit(f"settings {number} differ: {asked}\npage: {got}\ncommand line: {said}")
    times.sort()
    return {
        "settings": count,
        "seed": seed,
        "equal": count,
        "refused_by_both": refused,
        "ms_median": round(times[len(times) // 2], 1),
        "ms_95th": round(times[int(len(times) * 0.95)], 1),
        "ms_most": round(times[-1], 1),
    }


def shown_as_said(got: dict[str, list[list[str]]], said: dict[str, list[dict[str, dict[str, dict[str, int]]]]]) -> bool:
    """Whether the text in the page's tables is the command line's figures."""
    rows = [[gib(one["peak"]["gpu_nbytes"]), gib(one["peak"]["high_nbytes"])] for one in said["specs"]]
    (one,) = (one for one in said["specs"] if one["spec"] == got["shown"])
    figures = [
        gib(one["peak"][n][b]) for n in ("allocated", "reserved", "process") for b in ("low", "expected", "high")
    ]
    return [row[2:4] for row in got["compare"]] == rows and got["figures"] == figures


def first_answer(page: Page, address: str) -> dict[str, float]:
    """Milliseconds from the beginning of the navigation: page loaded, first answer drawn."""
    page.open("about:blank")
    page.before_scripts(
        'document.addEventListener("memopt:answer", () => requestAnimationFrame(() => '
        "{ window.answered ??= performance.now(); }));"
    )
    page.open(address)
    answered = page.until("window.answered", 120)
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    return {"loaded_ms": round(loaded, 1), "answered_ms": round(answered, 1)}


def loaded_nbytes(folder: Path) -> dict[str, int]:
    """Bytes of the site, as they are and as a server that compresses sends them."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {
        "files": len(contents),
        "nbytes": sum(map(len, contents)),
        "gzip": sum(len(gzip.compress(c)) for c in contents),
    }


def pictures(page: Page, address: str, folder: Path) -> list[str]:
    names = []
    for width, height in WIDTHS.items():
        for scheme in ("light", "dark"):
            page.screen(width, height, scheme)
            page.open("about:blank")
            page.open(f"{address}#{fragment(SHOWN)}")
            page.until("document.querySelectorAll('#plans li').length", 120)
            name = f"web-{width}-{scheme}.png"
            (folder / name).write_bytes(page.picture())
            names.append(name)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                raise SystemExit(f"the page is {wide} pixels wide on a screen of {width}")
    return names


def accessible(page: Page, address: str) -> dict[str, object]:
    """Contrast in both schemes, for what fits and what does not; names of controls; the Tab key."""
    found: dict[str, object] = {}
    for scheme in ("light", "dark"):
        page.screen(1280, 900, scheme)
        for gpu in ("24GiB", "90GiB"):  # nothing fits; something does
            page.open("about:blank")
            page.open(f"{address}#{fragment({**SHOWN, 'gpu': gpu})}")
            page.until("document.querySelectorAll('#plans li, #plan-more li').length", 120)
            page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
            found[f"contrast, {scheme}, {gpu}"] = contrast(page)
    return {**found, "controls": controls(page), "tab_stops": keyboard(page)}


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def run(args: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {}
    with Page(args.chromium) as page:
        found["chromium"] = page.version
        if args.only != "site":
            with serving(Server()) as address:
                if args.pictures:
                    found["pictures"] = pictures(page, address, args.pictures)
                found["access"] = accessible(page, address)
                page.screen(1280, 900, "light")
                found["server"] = {"first": first_answer(page, address), "later": compared(page, args.settings, 1)}
        if args.pyodide:
            with tempfile.TemporaryDirectory() as folder:
                site.write(folder, args.pyodide)
                sizes = loaded_nbytes(Path(folder))
                with serving(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))) as address:
                    first = [first_answer(page, address) for _ in range(2)]
                    later = compared(page, args.settings, 2)
                found["site"] = {"size": sizes, "first": first[0], "first_again": first[1], "later": later}
        # Settings that contradict each other are refused with 400, which the browser notes as an error, too.
        problems = [said for said in page.problems if "status of 400" not in said]
        if problems:
            raise SystemExit(f"the browser said: {problems}")
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--settings", type=int, default=200, help="random settings that are compared")
    parser.add_argument("--pyodide", metavar="FOLDER", help="Pyodide's npm package: the static site too")
    parser.add_argument("--only", choices=("server", "site"), help="one of the two, on a machine that is busy")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images", help="where they are written")
    parser.add_argument("--no-pictures", dest="pictures", action="store_const", const=None)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "web_page.json")
    return parser.parse_args()


if __name__ == "__main__":
    begin = time.perf_counter()
    arguments = parsed()
    result = run(arguments)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    write_result(arguments.output, result)
    print(json.dumps(result, indent=2))
