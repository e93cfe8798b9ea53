"""Figures in the documents are those of the results that are committed."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_types_of_transformers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from estimates_architectures_table import DOCUMENT, documented

    found = json.loads((ROOT / "benchmarks/results/estimates_architectures.json").read_text())
    text = DOCUMENT.read_text()
    assert documented(text, found) == text
    assert f"({len([r for r in found['types'] if r.get('exact')]) / len(found['types']):.1%})" in text


def test_a_large_model_is_traced_within_its_bar():
    found = json.loads((ROOT / "benchmarks/results/estimates_large.json").read_text())
    for name, row in found["results"].items():
        assert row["seconds"] < found["bar_seconds"], name
        assert row["resident_nbytes"] < found["bar_nbytes"], name
