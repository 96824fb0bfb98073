"""The report: self-contained, escaped, deterministic, and sensible on every odd input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic

from dyno.errors import UserError
from dyno.record import table
from dyno.report import html, markdown
from dyno.report import write as report
from dyno.report.payload import MOST_ROWS, payload
from dyno.report.rows import rows
from dyno.report.summary import summarise

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&|@all\u2028]]>{{x}}<!--"
LIMITS = ["perplexity <= 1.02 * baseline", "peak_memory_bytes <= 55 GB"]


class Page(HTMLParser):
    """Elements, attributes that load or run something, and the data document of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.add(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    @property
    def data(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.scripts[0])
        return document


def write(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> str:
    frame = table(records) if records else None
    return html(frame, records, tmp_path / "report.html", title=options.pop("title", "Study"), **options).read_text()


def test_whole_page(tmp_path: Path) -> None:
    text = write(tmp_path, synthetic.study(36, gpu=True), constraints=LIMITS)
    page = Page(text)
    assert {"best", "pareto", "effects", "parallel", "energy", "runs", "environment"} <= page.ids
    assert len(text) < 1_500_000
    said = " ".join(page.text)
    assert "dyno run model=160m precision=bf16 quantization=int8 attention=sdpa compile=on" in said
    assert "4.20×" in said
    assert page.data["baseline"] == 0
    assert page.data["status"].count("out_of_memory") == 1


def test_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path, synthetic.study(12))
    page = Page(text)
    assert all(load.startswith("#") for load in page.loads)
    assert "link" not in page.tags and "iframe" not in page.tags
    styles = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in styles and "@import" not in styles
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "http" not in policy[1]
    assert "'unsafe-inline'" not in policy[1].partition("script-src")[2].partition(";")[0]


def test_deterministic(tmp_path: Path) -> None:
    records = synthetic.study(20)
    assert write(tmp_path, records, constraints=LIMITS) == write(
        tmp_path, json.loads(json.dumps(records)), constraints=LIMITS
    )


def hostile(value: Any) -> Any:
    """The same structure with every string and every key that is free turned hostile."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [hostile(v) for v in value]
    if isinstance(value, dict):
        return {k + HOSTILE: hostile(v) for k, v in value.items()}
    return value


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    records = synthetic.study(12)
    clean = Page(write(tmp_path, records, title="x"))
    for record in records:
        for name in ("id", "reason", "created", "recipe_hash", "overrides", "fingerprint", "environment", "validity"):
            record[name] = hostile(record[name])
        record["validity"] = {"ok": False, "flags": [{"code": HOSTILE, "detail": HOSTILE}]}
        record["choices"] = {k: hostile(v) for k, v in record["choices"].items()} | {"plugin" + HOSTILE: record["id"]}
        record["metrics"] = {
            k + HOSTILE: {**m, "unit": HOSTILE, "source": HOSTILE} for k, m in record["metrics"].items()
        }
        record["config"]["quantization"] = {"knob" + HOSTILE: HOSTILE + str(record["duration_s"])}
        if record["status"] != "ok":
            record["status"] = HOSTILE
    text = write(tmp_path, records, title=HOSTILE, objectives=[("tokens_per_s" + HOSTILE, "maximize")])
    page = Page(text)
    assert page.handlers == [] and "img" not in page.tags
    assert page.tags.count("script") == clean.tags.count("script") == 3
    assert page.scripts[1:] == clean.scripts[1:]
    assert "<" not in page.scripts[0] and "\u2028" not in page.scripts[0]
    assert any(HOSTILE in name for name in page.data["axes"])
    assert HOSTILE in "".join(page.text)


def test_hostile_markdown_stays_text() -> None:
    records = synthetic.study(12)
    records[5]["reason"] = f"a | b\n# heading {HOSTILE}"
    records[0]["overrides"] = ["model=x", "note=```\nrm"]
    text = markdown(table(records), records, title=HOSTILE)
    outside = re.sub(r"(`{3,})sh\n.*?\n\1", "", text, flags=re.S)
    assert "<script" not in outside and "<img" not in outside and "@all" not in outside
    for line in outside.splitlines():
        if line.startswith("|") and "out\\_of" not in line and "timeout" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 4
    assert "\n# heading" not in text


@pytest.mark.parametrize("statuses", [[], ["ok"], ["crashed"], list(synthetic.FAILURES)])
def test_edge_inputs(tmp_path: Path, statuses: list[str]) -> None:
    records = [synthetic.record(i, status=status, precision="bf16") for i, status in enumerate(statuses)]
    page = Page(write(tmp_path, records))
    said = " ".join(page.text)
    if not statuses:
        assert "There are no runs yet" in said and "runs" not in page.ids
    elif "ok" not in statuses:
        assert "No run ended well" in said
        assert all(value is None for metric in page.data["metrics"] for value in metric["value"])
    assert markdown(None, records).startswith("## Dyno report")


def test_table_without_records(tmp_path: Path) -> None:
    frame = table(synthetic.study(24))
    page = Page(html(frame, None, tmp_path / "r.html").read_text())
    assert page.data["axis_names"] == ["precision", "attention", "compile", "quantization"]
    assert page.data["baseline"] == 0
    assert "dyno run" in " ".join(page.text)


def test_not_measured_is_empty_with_its_reason(tmp_path: Path) -> None:
    data = Page(write(tmp_path, synthetic.study(12))).data
    energy = next(m for m in data["metrics"] if m["name"] == "energy_j_per_token")
    assert set(energy["value"]) == {None}
    assert data["notes"][energy["note"][0]].startswith("no energy counter")
    failed = data["status"].index("out_of_memory")
    assert data["notes"][energy["note"][failed]].startswith("out_of_memory: predicted 91.2 GB")


def test_banner_on_unlike_fingerprints(tmp_path: Path) -> None:
    records = [synthetic.record(0), synthetic.record(1, machine="other", precision="bf16")]
    assert "not all comparable" in write(tmp_path, records)
    assert "not all comparable" in markdown(None, records)
    # Other data because another filter was chosen is what the study is about, not a mix-up.
    records = [synthetic.record(0), synthetic.record(1, data_filters=["exact_dedup"])]
    records[1]["fingerprint"] |= {"data": "other", "weights": "other"}
    assert "not all comparable" not in write(tmp_path, records)
    records[1]["choices"]["data_filters"] = []
    assert "not all comparable" in write(tmp_path, records)


def test_few_pairs_are_shown_but_not_judged(tmp_path: Path) -> None:
    """One pair, however sharp its interval, is not yet what an option does; an axis never varied alone is told."""
    records = [
        synthetic.record(0),
        synthetic.record(1, precision="bf16"),
        synthetic.record(2, attention="sdpa", compile="on"),
    ]
    page = Page(write(tmp_path, records))
    (effect,) = [e for e in page.data["effects"] if e["metric"] == "tokens_per_s"]
    assert (effect["axis"], effect["pairs"], effect["few"], effect["verdict"]) == ("precision", 1, True, "unsure")
    assert effect["low"] > 1
    assert page.data["effects_untold"].endswith(": attention, compile.")
    many = Page(write(tmp_path, synthetic.study(36))).data
    judged = {(e["option"], e["verdict"]) for e in many["effects"] if e["metric"] == "tokens_per_s" and not e["few"]}
    assert {("bf16", "better"), ("sdpa", "better")} <= judged and many["effects_untold"] == ""


def test_a_long_list_that_is_the_same_everywhere_is_folded(tmp_path: Path) -> None:
    records = [synthetic.record(0), synthetic.record(1, precision="bf16")]
    for number, record in enumerate(records):
        record["environment"] |= {"packages": {f"package{i}": "1.0" for i in range(40)} | {"odd": str(number)}}
    said = " ".join(Page(write(tmp_path, records)).text)
    assert "packages: 40, the same in all rows" in said and said.index("packages.odd") < said.index("packages: 40")


def test_user_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    records = synthetic.study(6)
    for options, words in (
        ({"objectives": [("tokens_per_s", "up")]}, "neither minimize nor maximize"),
        ({"constraints": ["perplexity below 3"]}, "cannot be read"),
        ({"baseline_id": "nobody"}, "in none of the 6 rows"),
    ):
        with pytest.raises(UserError, match=words):
            markdown(None, records, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        html(None, records, tmp_path / "no" / "r.html")


def test_from_a_directory_by_the_ending_of_the_file(tmp_path: Path) -> None:
    where = synthetic.write(tmp_path / "results", synthetic.study(6))
    assert "<!doctype html>" in report(where, tmp_path / "r.html").read_text()
    assert report(where, tmp_path / "r.md", constraints=LIMITS).read_text().startswith("## Dyno report")
    with pytest.raises(UserError, match=r"\.html or a \.md"):
        report(where, tmp_path / "r.pdf")


def test_a_very_long_table_stays_small(tmp_path: Path) -> None:
    records = synthetic.study(36) * 80
    for index, record in enumerate(records):
        records[index] = {**record, "id": f"{record['id']}-{index}"}
    summary = summarise(rows(None, records), None, [("tokens_per_s", "maximize")])
    data = payload(summary)
    assert len(data["ids"]) == MOST_ROWS
    assert data["baseline"] is not None and data["best"]
    assert len(write(tmp_path, records)) < 4_000_000
