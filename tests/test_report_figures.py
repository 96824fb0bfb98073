"""The plots of a Markdown report: what was measured is drawn where it belongs, and any text of a record stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import synthetic

from dyno.report import write
from dyno.report.figures import axis_effects, tradeoff
from dyno.report.rows import rows
from dyno.report.summary import Summary, effects, summarise

HOSTILE = "</text><script>alert(1)</script>\"'&]]>\x00\x1b\n\u2028\ud800{{x}}%"
OBJECTIVES = [("tokens_per_s", "maximize"), ("peak_memory_bytes", "minimize")]


def summary_of(records: list[dict[str, Any]], *constraints: str) -> Summary:
    return summarise(rows(None, records), list(constraints), OBJECTIVES)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Where the symbols of one fill stand, in the picture's own coordinates."""
    found = re.findall(r'<path[^>]*transform="translate\(([\d.]+),([\d.]+)\)"[^>]*fill="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y, fill in found if fill == colour]


def test_the_front_is_drawn_where_the_figures_are() -> None:
    records = [synthetic.record(i, precision=p) for i, p in enumerate(("bf16", "fp16", "tf32", "fp32"))]
    for record, (speed, memory) in zip(records, [(4e3, 2e9), (8e3, 4e9), (4e3, 4e9), (2e3, 1e9)], strict=True):
        record["metrics"] |= {
            "tokens_per_s": synthetic.metric(speed, "tokens/s"),
            "peak_memory_bytes": synthetic.metric(memory, "B"),
        }
    figure = tradeoff(summary_of(records, "peak_memory_bytes <= 3 GB"))
    assert figure is not None and figure.alt.endswith("4 runs, 2 on the Pareto front")
    (baseline,), on_front = marks(figure.svg, "#b4530a"), marks(figure.svg, "#0b62c4")
    (best,) = [place for place in on_front if place != baseline]
    assert (
        len(on_front) == 2 and best[0] > baseline[0] and best[1] < baseline[1]
    )  # more memory stands to the right, more speed above
    words = texts(figure.svg)
    assert "bf16" in words and "fp16" not in words and "peak_memory_bytes <= 3 GB" in words
    assert "peak_memory_bytes (GB), lower is better" in words and "tokens_per_s (ktokens/s), higher is better" in words


def test_few_pairs_are_hollow_and_uncoloured() -> None:
    few = summary_of([synthetic.record(0), synthetic.record(1, precision="bf16")])
    one = axis_effects(few, effects(few.rows, ["tokens_per_s"]))
    assert one is not None and "precision: bf16 over fp32 (1 pair)" in texts(one.svg)
    assert marks(one.svg, "#ffffff") and "#23733a" not in one.svg and "#b3261e" not in one.svg
    many = summary_of(synthetic.study(36))
    full = axis_effects(many, effects(many.rows, ["tokens_per_s"]))
    assert full is not None and len(marks(full.svg, "#23733a")) >= 4


def test_nothing_to_draw_is_no_picture() -> None:
    failed = summary_of([synthetic.record(0, status="crashed")])
    assert tradeoff(failed) is None and axis_effects(failed, []) is None
    alone = summarise(rows(None, [synthetic.record(0)]), None, OBJECTIVES[:1])
    assert tradeoff(alone) is None


def test_hostile_text_stays_text() -> None:
    records = synthetic.study(12)
    for record in records:
        record["choices"] = {axis: f"{o}{HOSTILE}" if o else o for axis, o in record["choices"].items()}
        record["metrics"] = {f"{name}{HOSTILE}": metric for name, metric in record["metrics"].items()}
    objectives = [(f"{metric}{HOSTILE}", direction) for metric, direction in OBJECTIVES]
    summary = summarise(rows(None, records), None, objectives)
    drawn = (tradeoff(summary), axis_effects(summary, effects(summary.rows, [metric for metric, _ in objectives])))
    for figure in drawn:
        assert figure is not None
        tags = {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(figure.svg).iter()}
        assert tags <= {"svg", "g", "path", "rect", "line", "text", "tspan", "defs", "clipPath", "style"}
        assert any("<script>alert(1)" in text for text in texts(figure.svg))


@pytest.mark.parametrize("name", ["summary.md", "a (b) #1.md"])
def test_markdown_shows_the_pictures_beside_it(tmp_path: Path, name: str) -> None:
    where = synthetic.write(tmp_path / "results", synthetic.study(12))
    out = write(where, tmp_path / name)
    shown = [unquote(file) for file in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", out.read_text())]
    assert shown == [f"{out.stem}-tradeoff.svg", f"{out.stem}-effects.svg"]
    for file in shown:
        assert (tmp_path / file).read_text().startswith("<svg")
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", "".join((tmp_path / file).read_text() for file in shown))
    assert "| quantization | int8 over none |" in out.read_text()
