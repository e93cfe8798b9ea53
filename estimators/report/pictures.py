"""An estimate as a page that needs nothing else, and as a picture."""

from __future__ import annotations

from html import escape

from estimators.errors import InputError
from estimators.memory.memory_row import FIGURES
from estimators.report.text import SHOWN_BY, as_text, best, first_change, verdict
from estimators.result import Column, Estimate
from estimators.training import describe_training
from estimators.units import gib

#: kind of row -> colour, told apart by people who see red and green alike (Okabe and Ito).
COLOURS = {
    "weights": "#0072b2",
    "buffers": "#56b4e9",
    "gradients": "#009e73",
    "state": "#e69f00",
    "activations": "#cc79a7",
    "temporaries": "#d55e00",
    "runtime": "#999999",
}

#: verdict -> class
_CLASSES = {"FITS": "yes", "TIGHT": "tight", "over": "no", "": ""}

_STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:44rem;padding:1rem;color:#222;background:#fff}
h1{font-size:1.3rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.4rem 0 .3rem}
p{margin:.3rem 0}.bar{display:flex;position:relative;height:1.7rem;background:#eee;border-radius:4px;overflow:hidden}
.bar i{display:block;height:100%}.card{position:absolute;top:0;bottom:0;width:3px;background:#000}
.key span{display:inline-block;margin-right:.9rem;white-space:nowrap}
.key b{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.25rem .3rem;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top}td.n{text-align:right;white-space:nowrap}
.yes{color:#006b4f;font-weight:600}.no{color:#b00020;font-weight:600}.tight{color:#8a5a00;font-weight:600}
.most{position:absolute;top:0;bottom:0;border-left:2px dashed #555}
details{margin:.4rem 0}summary{cursor:pointer}
@media(prefers-color-scheme:dark){body{background:#111;color:#eee}.bar{background:#333}td,th{border-color:#333}
.card{background:#fff}.yes{color:#4fd1a5}.no{color:#ff8a80}.tight{color:#ffcc66}.most{border-color:#bbb}}
"""


def as_html(e: Estimate) -> str:
    """One file: no script, no font, no picture from elsewhere."""
    most = max([c.high for c in e.columns] + [e.gpu or 0]) or 1
    used = [kind for kind in COLOURS if any(c.at_peak(kind) for c in e.columns)]
    step = describe_training(e.training, e.model.inputs is not None)
    trainable = f", {e.trainable:,} of them trainable" if e.trainable != e.parameters else ""
    card = f" The line across a bar is the card's {gib(e.gpu)}." if e.gpu else ""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(e.model.name)}: memory</title><style>{_STYLE}</style>",
        f"<h1>{escape(e.model.name)}</h1>",
        f"<p>{e.parameters:,} parameters{trainable}; {escape(e.weights)} weights, "
        f"{escape(e.gradients)} gradients{'; ' + escape(step) if step else ''}.</p>",
        '<p class="key">' + "".join(f'<span><b style="background:{COLOURS[k]}"></b>{k}</span>' for k in used) + "</p>",
        *(_section(e, i, most) for i in range(len(e.columns))),
        f"<p>Each bar is what a process is expected to take at the peak, the dashed line what it takes at most.{card}"
        + (f" Not contained: {escape('; '.join(e.without))}." if e.without else "")
        + "</p>",
    ]
    if e.fits is False:
        parts.append(f"<p>Change first: {escape(first_change(best(e), e))}.</p>")
    return "\n".join([*parts, *(f"<p>{escape(note)}.</p>" for note in e.model.notes), "</html>", ""])


def _section(e: Estimate, index: int, most: int) -> str:
    column = e.columns[index]
    segments = "".join(
        f'<i style="width:{100 * column.at_peak(kind) / most:.3f}%;background:{colour}"></i>'
        for kind, colour in COLOURS.items()
        if column.at_peak(kind)
    )
    line = f'<span class="card" style="left:calc({100 * e.gpu / most:.3f}% - 3px)"></span>' if e.gpu else ""
    said = ""
    if e.gpu:
        said = f' <span class="{_CLASSES[e.verdict(column)]}">{escape(verdict(column, e.gpu))}</span>'
    bounds = _bounds(column) if e.activations else ""
    if column.high > column.peak.nbytes:
        line += f'<span class="most" style="left:{100 * column.high / most:.3f}%"></span>'
    rows = "".join(
        f"<tr><td>{escape(r.what)}<br><small>{escape(r.detail)}</small>"
        f'<td class="n">{gib(r.nbytes)}<td>{escape(r.tier)}<br><small>{escape(r.provenance)}</small>'
        for r in column.rows
        if column.peak.phase in r.phases
    )
    return (
        f'<h2>{escape(column.spec)}</h2><div class="bar">{segments}{line}</div>'
        f"<p>{gib(column.peak.nbytes)} in the phase <em>{column.peak.phase}</em>.{said}</p>{bounds}"
        f"<details><summary>What is held then</summary><table><tr><th>what<th>bytes<th>where, and how it is known"
        f"{rows}</table></details>"
    )


def _bounds(column: Column) -> str:
    """The three figures as a table."""
    rows = "".join(
        f"<tr><td>{name}<br><small>{SHOWN_BY[name]}</small>"
        + "".join(f'<td class="n">{gib(n)}' for n in getattr(column, name))
        for name in FIGURES
    )
    return f"<table><tr><th><th>at least<th>expected<th>at most{rows}</table>"


def write_html(e: Estimate, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(as_html(e))


def write_plot(e: Estimate, path: str) -> None:
    """Stacked bars by matplotlib. Raises :class:`InputError` where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(e.columns)), layout="constrained")
    names = [column.spec for column in e.columns]
    left = [0.0] * len(names)
    for kind, colour in COLOURS.items():
        sizes = [column.at_peak(kind) / 2**30 for column in e.columns]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    low, high = ([abs(getattr(c, side) - c.peak.nbytes) / 2**30 for c in e.columns] for side in ("low", "high"))
    if any(high):
        axes.errorbar(
            left,
            names,
            xerr=[low, high],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=4,
            label="at least, at most",
        )
    if e.gpu:
        axes.axvline(e.gpu / 2**30, color="black", label=f"card: {gib(e.gpu)}")
    axes.invert_yaxis()
    axes.set_xlabel("GPU memory of the process at the peak, GiB")
    axes.set_title(as_text(e).splitlines()[0])
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
