"""The grammar of constraints: reads what it prints, gives every other text one clear line, the same for all its users."""

from __future__ import annotations

import math
import operator

import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from dyno.constraints import SUFFIXES, Constraint, constraint
from dyno.errors import UserError
from dyno.report.rows import rows
from dyno.report.summary import limit_of
from dyno.study.goals import Goals, Objective

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,12}", fullmatch=True).map(lambda name: f"m{name}x")  # of no known unit
NUMBERS = st.floats(1e-6, 1e12)
GAPS = st.sampled_from(["", " ", "  "])


def mistake(text: object) -> str:
    with pytest.raises(UserError) as error:
        constraint(text)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(NAMES, st.sampled_from(sorted(OPERATORS)), NUMBERS, st.booleans(), GAPS, st.floats(-1e12, 1e12))
def test_reads_what_it_prints(metric, op, number, relative, gap, value):
    text = f"{metric}{gap}{op}{gap}{number!r}" + (f"{gap}*{gap}baseline" if relative else "")
    made = constraint(text)
    assert made == Constraint(text, metric, op, number, relative)
    bound = made.bound({metric: 2.0})
    assert bound == (2 * number if relative else number)
    assert made.bound({}) == (None if relative else number)
    assert (made.violation(value, bound) <= 0) == OPERATORS[op](value, bound)


@given(NAMES, NUMBERS, st.sampled_from(sorted(SUFFIXES)), GAPS)
def test_a_suffix_multiplies(metric, number, suffix, gap):
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    decimal = {"n": -9, "u": -6, "µ": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12}
    prefix = suffix if suffix in decimal and suffix != "m" else suffix[:-1]  # 'm' alone is no suffix
    factor = binary[prefix] if prefix in binary else 10.0 ** decimal.get(prefix, 0)
    made = constraint(f"{metric} <= {number!r}{gap}{suffix}")
    assert made.number == pytest.approx(number * factor) and not made.relative


@pytest.mark.parametrize(
    ("text", "number", "relative"),
    [
        ("peak_memory_bytes <= 60e9", 60e9, False),
        ("peak_memory_bytes<=8 GiB", 8 * 2**30, False),
        ("ttft_s < 250 ms", 0.25, False),
        ("itl_p99_s < 800us", 8e-4, False),
        ("energy_j <= 2 kJ", 2000.0, False),
        ("tokens_per_s >= 50 k", 5e4, False),
        ("perplexity <= 1.5 * baseline", 1.5, True),
        ("perplexity <= baseline*1.5", 1.5, True),
        ("model_bytes <= baseline", 1.0, True),
        ("  train.loss > -.5\n", -0.5, False),
    ],
)
def test_examples(text, number, relative):
    made = constraint(text)
    assert made.number == pytest.approx(number) and made.relative == relative and made.text == text.strip()


@given(st.text(max_size=30) | st.from_regex(r"x [<>]=? ?[0-9. eE*+a-zGiB]{0,9}", fullmatch=True))
def test_any_other_text_is_one_clear_error(text):
    try:
        made = constraint(text)
    except UserError as error:
        assert repr(text) in str(error) and "cannot be read: " in str(error) and "\n" not in str(error)
    else:
        assert math.isfinite(made.number) and made.metric in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *((text, "write 'metric <= number'") for text in ("x == 3", "x <= ", "x <= 3 * basis", "<= 3", "x <= 3 4")),
        *((text, "write 'metric <= number'") for text in ("x <= baseline * ", "x <= 3 GiB * baseline", None, 5)),
        ("x <= 1e999", "out of range"),
        ("x <= 1e300 TB", "out of range"),
        ("x <= 8 Gib", "no unit 'Gib'; did you mean GiB"),
        ("x <= 8 parsecs", "no unit 'parsecs'"),
        ("energy_j_per_token <= 3 m", "no unit 'm'"),
        ("peak_memory_bytes <= 8 ms", "peak_memory_bytes is in B, not in ms"),
        ("tokens_per_s >= 5 s", "tokens_per_s is in tokens/s, not in s"),
    ],
)
def test_wrong_texts(text, why):
    assert why in mistake(text)


@given(
    st.sampled_from(sorted(OPERATORS)),
    st.floats(0.5, 2.0) | st.just(1.0),
    st.sampled_from(["* baseline", "k", "GiB", ""]),
    st.floats(0.1, 1e12),
)
def test_a_study_and_a_report_say_the_same(op, number, ending, value):
    """One text, one meaning: whatever a study calls broken, its report calls violated."""
    text = f"size {op} {number!r} {ending}".strip()
    records = [synthetic.record(0), synthetic.record(1)]
    for record, figure in zip(records, (1e3, value), strict=True):
        record["metrics"]["size"] = synthetic.metric(figure, "")
    baseline, row = rows(None, records)
    result = {"status": "ok", "reason": None, "metrics": {"size": value}}
    verdict = Goals([Objective("size", "minimize")], [constraint(text)]).judge(result, {"size": 1e3})
    assert limit_of(text, baseline).holds(row) == (not verdict.broken)
