"""Records: whole or absent, never lost, never guessed at; and the table made of them."""

from __future__ import annotations

import json
import math
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyno import record
from dyno.errors import UserError
from dyno.record import Metric

REFERENCE = Path(__file__).parents[1] / "results" / "reference"


def made(run_id: str, **more: object) -> dict:
    """A record in the order in which the runner writes it."""
    out = {
        "schema": record.SCHEMA,
        "id": run_id,
        "status": "ok",
        "reason": None,
        "created": "2026-01-01T00:00:00+00:00",
        "duration_s": 1.0,
        "recipe_hash": "abc",
        "overrides": [],
        "choices": {"precision": "bf16", "data_filters": ["a", "b"], "model": "nano"},
        "config": {
            "precision": {"_target_": "x.Y", "dtype": "bfloat16"},
            "data_filters": {"a": {"_target_": "x.A", "least": 3}, "b": {"_target_": "x.B", "skip": ["p", "q"]}},
            "model": {"layers": 4, "path": None},
        },
        "metrics": {
            "step_time_s": {"value": 0.5, "unit": "s", "count": 9, "low": 0.4, "high": 0.6},
            "energy_j": {"value": None, "unit": "J", "count": 0, "reason": "no meter"},
        },
        "details": {},
        "environment": {"cpu": "c"},
    }
    return out | more


def put(root: Path, run: dict) -> Path:
    runs = record.runs_dir(root)
    aside = runs / f".running-{run['id']}"
    aside.mkdir()
    return record.publish(aside, run, runs)


def edit(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more, indent=1))


def test_metric_is_a_number_or_a_reason():
    assert Metric(math.nan, "s").reason == "the value was not finite" and Metric(math.inf, "s").value is None
    with pytest.raises(ValueError, match="needs a reason"):
        Metric(None, "s")
    assert record.to_json({"m": Metric(1.0, "s", 3, source="clock")}) == {
        "m": {"value": 1.0, "unit": "s", "count": 3, "source": "clock"}
    }
    assert record.to_json({"m": record.unmeasured("J", "no meter")})["m"]["reason"] == "no meter"


def test_numpy_numbers_stay_numbers(tmp_path):
    """default=str would have made text of them."""
    record.write_json(tmp_path / "x.json", {"a": np.float32(0.5), "b": np.int64(7), "p": Path("q")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.5, "b": 7, "p": "q"}
    assert type(Metric(np.float32(0.5), "s").value) is float  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_write_json_is_whole_or_not_at_all(tmp_path, value):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        record.write_json(path, {"a": value})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_scrap(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        record.write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_records_are_readable_by_others(tmp_path):
    """A shared results directory: the mode is the umask's, not a temporary file's 0600."""
    (tmp_path / "plain").touch()
    record.write_json(tmp_path / "x.json", {})
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_unpublished_runs_are_invisible(tmp_path):
    put(tmp_path, made("one"))
    half = record.runs_dir(tmp_path) / ".running-two"
    half.mkdir()
    record.write_json(half / "record.json", made("two"))
    assert [r["id"] for r in record.read_records(tmp_path)] == ["one"]


def test_two_processes_publishing_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dyno import record\n"
        "runs = record.runs_dir(sys.argv[1])\n"
        "for i in range(100):\n"
        "    run = record.new_id('same-hash')\n"
        "    aside = runs / f'.running-{run}'; aside.mkdir()\n"
        "    record.publish(aside, {'schema': 1, 'id': run, 'status': 'ok', 'choices': {}, 'config': {}, 'metrics': {},"
        " 'who': sys.argv[2]}, runs)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    read = record.read_records(tmp_path)
    assert sorted(r["who"] for r in read) == ["a"] * 100 + ["b"] * 100
    assert not list((tmp_path / "runs").glob(".*"))


def test_table_has_a_row_a_run_and_a_column_an_axis_knob_and_metric(tmp_path):
    for i in range(300):
        run = made(f"{i:03d}")
        run["config"]["model"]["layers"] = i
        run["metrics"]["step_time_s"]["value"] = i / 10
        if i % 3 == 0:
            run |= {"status": "crashed", "reason": "why", "metrics": {}}
        put(tmp_path, run)
    frame = record.table(tmp_path)
    assert list(frame.columns) == [
        "id", "created", "status", "reason", "recipe_hash", "duration_s",
        "precision", "data_filters", "model",
        "precision.dtype", "data_filters.a.least", "data_filters.b.skip", "model.layers",
        "step_time_s", "step_time_s_low", "step_time_s_high", "energy_j",
    ]  # fmt: skip
    assert list(frame["id"]) == [f"{i:03d}" for i in range(300)]
    assert list(frame["model.layers"]) == list(range(300))
    assert set(frame["data_filters"]) == {"a+b"} and set(frame["data_filters.b.skip"]) == {"p+q"}
    failed = frame["status"] == "crashed"
    assert failed.sum() == 100 and frame["step_time_s"].isna().equals(failed)
    assert frame["step_time_s"][299] == 29.9 and frame["energy_j"].isna().all()


def test_columns_keep_their_order_when_later_runs_bring_new_ones(tmp_path):
    put(tmp_path, made("1"))
    put(tmp_path, made("2", config={"precision": {"new_knob": 5}}, metrics={"new_metric": {"value": 1, "unit": "1"}}))
    columns = list(record.table(tmp_path).columns)
    assert columns.index("precision.new_knob") < columns.index("step_time_s") < columns.index("new_metric")


def test_a_column_has_one_type(tmp_path):
    """Two options of an axis with a knob of one name: Parquet takes the table all the same."""
    put(tmp_path, made("1", config={"precision": {"level": 3}}))
    put(tmp_path, made("2", config={"precision": {"level": "high"}}))
    frame = record.table(tmp_path)
    assert list(frame["precision.level"]) == ["3", "high"]
    frame.to_parquet(tmp_path / "x.parquet")


def test_quick_reading_agrees_with_whole_reading(tmp_path):
    """The table decodes a record only up to its metrics; text that looks like the mark does not mislead it."""
    put(tmp_path, made("1", reason='x\n "details": y', overrides=['\n "details":']))
    (record.runs_dir(tmp_path) / "2").mkdir()
    (tmp_path / "runs" / "2" / "record.json").write_text(json.dumps(made("2")))  # another writer's layout
    quick, whole = record.table(tmp_path), record.table(record.read_records(tmp_path))
    assert quick.equals(whole) and len(quick) == 2


def independent_rows(where: Path) -> list[dict]:
    """A dict a record by the plainest means: the standard library's JSON, and every rule of a table spelt out once."""
    rows = []
    for path in where.rglob("record.json"):
        run = json.loads(path.read_text())
        row = {name: run[name] for name in ("id", "created", "status", "reason", "recipe_hash", "duration_s")}
        row |= {axis: "+".join(made) if isinstance(made, list) else made for axis, made in run["choices"].items()}
        stack = [(axis, run["config"].get(axis)) for axis in run["choices"] if axis not in ("hardware", "measure")]
        while stack:
            name, value = stack.pop()
            if isinstance(value, dict):
                stack += [(f"{name}.{key}", item) for key, item in value.items() if key != "_target_"]
            elif "." in name and value is not None:
                row[name] = "+".join(map(str, value)) if isinstance(value, list) else value
        for name, metric in run["metrics"].items():
            row |= {name: metric["value"]}
            row |= {f"{name}_{end}": metric.get(end) for end in ("low", "high") if "low" in metric}
        rows.append(row)
    return sorted(rows, key=lambda row: row["id"])


@pytest.mark.parametrize("where", ["h100/quickstart-160m", "cpu-2core", "."])
def test_the_committed_records_as_an_independent_frame(where):
    rows, frame = independent_rows(REFERENCE / where), record.table(REFERENCE / where)
    assert set(frame.columns) == {name for row in rows for name in row} and len(frame) == len(rows) > 5
    for name in frame:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, str) for value in values):
            values = [value if value is None else str(value) for value in values]
        pd.testing.assert_series_equal(frame[name], pd.Series(values, name=name))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_decode_reads_what_json_writes(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate is written only as an escape
        data = json.dumps(value).encode()
    empty = json.loads(data, parse_constant=lambda name: None)
    assert repr(record.decode(data)) == repr(empty)  # types and the sign of zero too


@given(st.binary(max_size=12) | st.text('[]{}:,"\\u0e+-.1Nan tlrfs', max_size=12).map(str.encode))
def test_decode_takes_json_alone(data):
    try:
        expected = json.loads(data.decode(), parse_constant=lambda name: None)
    except ValueError:
        with pytest.raises(ValueError):
            record.decode(data)
    else:
        assert repr(record.decode(data)) == repr(expected)


def test_records_of_another_machine_join(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    put(here, made("a", fingerprint={"machine": "m1"}))
    put(there, made("b", fingerprint={"machine": "m2"}))
    shutil.copytree(there / "runs" / "b", here / "runs" / "b")
    assert list(record.table(here)["id"]) == ["a", "b"]
    nested = tmp_path / "all"
    shutil.copytree(here, nested / "m1")
    shutil.copytree(there, nested / "m2")  # b lies there twice and counts once
    assert list(record.table(nested)["id"]) == ["a", "b"]
    edit(nested / "m2" / "runs" / "b" / "record.json", status="crashed")
    with pytest.raises(UserError, match="different runs with one id"):
        record.table(nested)


def test_foreign_nan_becomes_empty_with_a_reason(tmp_path):
    path = put(tmp_path, made("1")) / "record.json"
    path.write_text(path.read_text().replace("0.5", "NaN").replace("0.6", "Infinity"))
    metric = record.read_records(tmp_path)[0]["metrics"]["step_time_s"]
    assert metric["value"] is None and metric["reason"] == "the value was not finite" and metric["high"] is None
    assert record.table(tmp_path)["step_time_s"].isna().all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a record"),
        (b"[]", "schema"),
        (b'{"schema": 99}', "another version"),
        (b'{"schema": 1, "id": "x"}', "lacks"),
        (b"\xff\xfe", "is not a record"),
        (None, "is not a record"),  # cut in the middle of the part that a table does not show
    ],
)
def test_a_broken_record_is_one_clear_line(tmp_path, content, message):
    path = put(tmp_path, made("1")) / "record.json"
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    for read in (record.read_records, record.table):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_find(tmp_path):
    run = put(tmp_path, made("1"))
    expected = [run / "record.json"]
    assert record.find(tmp_path) == record.find(tmp_path / "runs") == record.find(run) == expected
    assert record.find(run / "record.json") == expected
    with pytest.raises(UserError, match="does not exist"):
        record.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert record.find(tmp_path / "empty") == [] and record.table(tmp_path / "empty").empty


def test_ids_sort_by_time_and_differ():
    ids = [record.new_id("0123456789abcdef") for _ in range(50)]
    assert len(set(ids)) == 50 and all("-01234567-" in i for i in ids)
    assert ids[0][:15] <= ids[-1][:15]
