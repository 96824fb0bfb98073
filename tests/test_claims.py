"""Claims: their files, the rule of verdicts on simulated noise, what planned ones compute, and runs with a fake worker."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

from dyno import cli, runner
from dyno.claims import formula, judge, planned, session, verdict
from dyno.claims.claim import Claim, Figure, Range, chosen, load, read
from dyno.claims.evidence import Measured
from dyno.errors import UserError
from dyno.recipe import compose
from dyno.record import read_records

KNOWN = load()
HERE = judge.Place("cpu", "box")
FILE = {
    "axis": "checkpointing", "claim": "half the memory", "kind": "measure", "recipes": {"a": [], "b": ["seed=1"]},
    "figures": [{"what": "memory", "formula": "a.peak_memory_bytes / b.peak_memory_bytes", "claimed": [0.4, 0.6]}],
}  # fmt: skip


def of(name: str, **more: Any) -> Claim:
    return read(name, {**FILE, **more})


# files


def test_every_file_reads_and_says_what_it_tests():
    assert len(KNOWN) >= 27
    for claim in KNOWN.values():
        assert claim.kind != "plan" or not claim.recipes, claim.id
        assert any(f.claimed for f in claim.figures), claim.id
        used = {source for f in claim.figures for source in f.sources}
        assert used == {*claim.recipes, *claim.plans}, f"{claim.id} has recipes or plans that no figure takes"


def test_every_setting_and_recipe_composes():
    """Each list of overrides once: many claims share theirs."""
    lists = {tuple(words) for claim in KNOWN.values() for words in claim.setting.values()}
    lists |= {tuple(words) for claim in KNOWN.values() for made in claim.recipes.values() for words in made.values()}
    for words in lists:
        assert compose(list(words)).techniques


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": {}}, "has no key 'recipe'; did you mean recipes"),
        ({"axis": "checkpoint"}, "did you mean checkpointing"),
        ({"kind": "guess"}, "one of measure, plan, scale"),
        ({"recipes": {"a": "seed=1", "b": []}}, "recipes.a is 'seed=1'; it is a list"),
        ({"setting": {"gpu": []}}, "has no key 'gpu'; "),
        ({"plans": {"p": {"layouts": {}}}}, "did you mean layout"),
        ({"figures": [{**FILE["figures"][0], "claimd": 1}]}, "did you mean claimed"),
        ({"figures": [{**FILE["figures"][0], "claimed": [2, 1]}]}, "low end lies above"),
        ({"figures": [{**FILE["figures"][0], "claimed": [None, None]}]}, "null for an open end"),
        ({"figures": [{"what": "x", "formula": "a.x"}]}, "has no range"),
        ({"figures": [{**FILE["figures"][0], "formula": "bb.x"}]}, "no recipe or plan 'bb'"),
        ({"figures": [{**FILE["figures"][0], "formula": "__import__('os').x"}]}, "is no formula"),
        ({"figures": [{**FILE["figures"][0], "formula": "a.x ** 9"}]}, "is no formula"),
    ],
)
def test_a_wrong_file_is_told_with_what_would_be_right(change, told):
    with pytest.raises(UserError, match="claim mine") as error:
        of("mine", **change)
    assert told in str(error.value)


def test_an_unknown_claim_is_told_with_close_matches():
    with pytest.raises(UserError, match="did you mean zero1-memory"):
        chosen(["zero1-memry"])


def test_a_claim_of_ones_own_takes_one_file(tmp_path):
    import yaml

    (tmp_path / "conf" / "claims").mkdir(parents=True)
    (tmp_path / "conf" / "claims" / "mine.yaml").write_text(yaml.safe_dump(FILE))
    assert [c.id for c in chosen(["mine"], [str(tmp_path)])] == ["mine"]


def test_the_command_line_may_change_the_setting_and_not_the_test():
    claim = of(
        "mine", setting={"cpu": ["workload.seq=64", "workload.batch=4"]}, recipes={"a": [], "b": ["workload.batch=8"]}
    )
    words = claim.overrides("b", "cpu", ["workload.seq=32", "workload.batch=2"])
    assert sorted(words) == ["workload.batch=8", "workload.seq=32"]


def test_formulas():
    assert formula.evaluate("1 - -a.x / (b['y.z'] * 2)", lambda s, n: {"x": 3.0, "y.z": 2.0}[n]) == 1.75
    draws = formula.evaluate("a.x / b.x", lambda s, n: np.array([2.0, 6.0]) if s == "a" else 2.0)
    assert draws.tolist() == [1.0, 3.0]


# the rule


@pytest.mark.parametrize(
    ("value", "interval", "said"),
    [
        (1.5, (1.4, 1.6), "holds"), (1.5, None, "holds"), (1.0, None, "holds"), (2.0, (1.9, 2.1), "inconclusive"),
        (2.5, (2.4, 2.6), "does not hold"), (0.5, None, "does not hold"), (1.5, (0.5, 2.5), "inconclusive"),
    ],
)  # fmt: skip
def test_verdict_of_a_figure(value, interval, said):
    assert verdict.of_figure(value, *(interval or (None, None)), Range(1.0, 2.0))[0] == said


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ("HH", "holds"), ("FF", "does not hold"), ("HF", "holds in part"), ("HU", "inconclusive"), ("FU", "inconclusive"),
        ("HFU", "holds in part"), ("HN", "holds in part"), ("FN", "does not hold"), ("NN", "not testable here"),
        ("HR", "not run"), ("", "not testable here"),
    ],
)  # fmt: skip
def test_verdict_of_a_claim(figures, said):
    words = {"H": "holds", "F": "does not hold", "U": "inconclusive", "N": "not testable here", "R": "not run"}
    assert verdict.of_claim(words[letter] for letter in figures) == said


def timed(rng: np.random.Generator, median: float, name: str, where: Path, steps: int = 60) -> dict[str, Any]:
    """A record whose step times are drawn, with samples on disk."""
    times = median * rng.lognormal(0, 0.08, steps)
    record = synthetic.record(seed := int(rng.integers(1 << 30)), knobs={"workload.x": seed})
    record["metrics"]["step_time_s"] = {"value": float(np.median(times)), "unit": "s", "count": steps}
    folder = where / f"{name}-{seed}"
    folder.mkdir()
    np.savez(folder / "samples.npz", **{"train.step_times_s": times})
    return record | {"_path": str(folder)}


@pytest.mark.parametrize(
    ("true_ratio", "right", "wrong", "most_wrong"),
    [(1.5, "holds", "does not hold", 0.0), (1.0, "inconclusive", "", 0.0), (1.1, "does not hold", "holds", 0.0)],
)
def test_error_rates_on_simulated_noise(tmp_path, true_ratio, right, wrong, most_wrong):
    """Inside, on the edge of and outside of the range [1.2, 2], or of [1, 2] for the edge; 60 pairs of runs each."""
    rng = np.random.default_rng(7)
    low = 1.0 if true_ratio == 1.0 else 1.2
    figure = Figure("time", "a.step_time_s / b.step_time_s", claimed=Range(low, 2.0))
    said = []
    for _ in range(60):
        evidence = {
            "a": Measured([timed(rng, true_ratio, "a", tmp_path)]),
            "b": Measured([timed(rng, 1.0, "b", tmp_path)]),
        }
        said.append(judge.judge_figure(figure, evidence, "cpu").verdict)
    if true_ratio == 1.0:  # each side in at most 2.5%, and three standard errors more
        limit = 0.025 + 3 * (0.025 * 0.975 / len(said)) ** 0.5
        assert said.count("holds") <= limit * len(said) and said.count("does not hold") <= limit * len(said)
    assert said.count(right) >= 0.8 * len(said)
    assert said.count(wrong) == 0


def test_losses_of_the_same_text_pair_up(tmp_path):
    """Two models that differ by 1% on every window: the text's own spread does not hide it."""
    losses = np.random.default_rng(0).normal(3.0, 0.5, 64)
    records = []
    for i, factor in enumerate((1.0, 1.01)):
        made = synthetic.record(i)
        made["details"] = {"train": {"validation_losses": list(losses * factor)}}
        made["metrics"]["validation_loss"] = {
            "value": float(np.mean(losses * factor)),
            "unit": "nats",
            "low": 2.8,
            "high": 3.2,
        }
        records.append(made)
    figure = Figure("loss", "b.validation_loss / a.validation_loss", claimed=Range(1.009, 1.011))
    found = judge.judge_figure(figure, {"a": Measured(records[:1]), "b": Measured(records[1:])}, "cpu")
    assert found.verdict == "holds" and found.low == pytest.approx(1.01) and found.high == pytest.approx(1.01)


def test_repeats_widen_the_interval():
    figure = Figure("rate", "a.tokens_per_s / b.tokens_per_s", claimed=Range(0.9, 1.1))
    one, far, base = synthetic.record(0), synthetic.record(1, noise=0.3), synthetic.record(2)
    alone = judge.judge_figure(figure, {"a": Measured([one]), "b": Measured([base])}, "cpu")
    pooled = judge.judge_figure(figure, {"a": Measured([one, far]), "b": Measured([base])}, "cpu")
    assert alone.verdict == "holds" and pooled.verdict == "inconclusive" and pooled.high > 1.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "unsupported", "reason": "needs 8 GPUs"}, "not testable here"),
        ({"status": "out_of_memory", "reason": "too much"}, "inconclusive"),
        ({"metrics": {"peak_memory_bytes": {"value": None, "unit": "B", "reason": "no counter"}}}, "inconclusive"),
        ({"metrics": {}}, "inconclusive"),
    ],
)
def test_what_is_missing_is_told(change, said):
    row = judge.judge(of("mine"), {"a": [synthetic.record(0)], "b": [synthetic.record(1) | change]}, HERE)
    assert row.verdict == said and row.figures[0].value is None
    assert (change.get("reason") or "peak_memory_bytes was not measured") in row.reason


def test_a_verdict_names_model_machine_and_runs():
    records = {"a": [synthetic.record(0, precision="bf16")], "b": [synthetic.record(3)]}
    row = judge.judge(of("mine"), records, HERE).to_json()
    assert row["verdict"] == "does not hold" and row["reason"] == "memory: above the range"
    assert (
        row["model"] == "nano" and "EPYC" in row["machine"] and len(row["runs"]) == 2 and row["flags"] == ["short_run"]
    )


# plans


@pytest.mark.parametrize(
    ("name", "figure", "value", "within"),
    [
        ("memory-weights", 0, 700e9, 0.01), ("memory-training-state", 1, 1.4e12, 0.01), ("pipeline-bubble", 3, 3 / 19, 1e-9),
        ("cost-training", 0, 256 * 30 * 720, 1e-9), ("parallel-3d", 0, 1024, 1e-9),
        ("zero-infinity", 3, 18e12 / 4e12, 0.02),
    ],
)  # fmt: skip
def test_plans_give_the_arithmetic(name, figure, value, within):
    row = judge.judge(KNOWN[name], {}, HERE)
    assert row.figures[figure].value == pytest.approx(value, rel=within)
    assert row.figures[figure].label == "predicted"
    assert KNOWN[name].kind != "plan" or row.verdict.startswith("planned: ")


def test_the_largest_model_is_the_last_that_fits():
    from dyno.measure.environment import planned as stated
    from dyno.plan import predict

    words = ["model=nano", "hardware=h100", "hardware.memory_bytes=3000000000"]
    found = planned.quantities({"recipe": words, "largest": "model.layers"}, "here")
    fits = []
    for extra in (0, 1):
        layers = round(4 * (found["parameters"] - 33024) / (820480 - 33024)) + extra
        recipe = compose([*words, f"model.layers={layers}"])
        fits.append(predict(recipe, stated(recipe.config["hardware"])).verdict() is None)
    assert fits == [True, False]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"recipe": ["model=nano"]}, "stated hardware"),
        ({"recipe": ["model=nano", "hardware=h100"], "layout": {"dpp": 2}}, "did you mean pp, dp"),
        ({"recipe": ["model=nano", "hardware=h100"], "largest": "model.name"}, "no whole-number knob"),
    ],
)
def test_a_wrong_plan_is_told(plan, told):
    with pytest.raises(UserError, match=told):
        planned.quantities(plan, "here")


# runs


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of claims, and a worker that takes its figures from the seed: 3 runs out of memory, 5 crashes once."""
    import yaml

    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, sys
        from pathlib import Path
        directory = Path(sys.argv[1])
        seed = json.loads((directory / "request.json").read_text())["recipe"]["config"]["seed"]
        with Path({str(tmp_path / "ran")!r}).open("a") as file:
            file.write(str(seed))
        result = {{"status": "ok", "metrics": {{"peak_memory_bytes": {{"value": 100.0 + seed, "unit": "B", "count": 1}}}}}}
        if seed == 3:
            result = {{"status": "out_of_memory", "reason": "too much"}}
        mark = Path({str(tmp_path / "crashed")!r})
        if seed == 5 and not mark.exists():
            mark.touch()
            result = {{"status": "crashed", "reason": "bad luck"}}
        (directory / "result.json").write_text(json.dumps(result))
        """)
    )
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-S", str(script)])
    folder = tmp_path / "mine" / "conf" / "claims"
    folder.mkdir(parents=True)
    figure = {"what": "memory", "formula": "a.peak_memory_bytes / b.peak_memory_bytes", "claimed": [0.98, 1.0]}
    for name, seeds in {"c1": (0, 1), "c2": (1, 2), "c3": (0, 3), "c5": (0, 5)}.items():
        more = ["placement=none"] if name == "c2" else []  # the same recipe in other words
        recipes = {letter: [f"seed={seed}", *more] for letter, seed in zip("ab", seeds, strict=True)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**FILE, "recipes": recipes, "figures": [figure]}))
    return tmp_path


def claims(bench: Path, capsys, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, verdicts by id, stderr) of `dyno claims`, and what ran is forgotten."""
    (bench / "ran").write_text("")
    code = cli.main(["claims", *words, "--plugins", str(bench / "mine")])
    shown = capsys.readouterr()
    rows = json.loads(shown.out.strip().splitlines()[-1])["claims"] if shown.out.strip() else []
    return code, {row["id"]: row for row in rows}, shown.err


SUBJECT = ["hardware=cpu", "workload=data"]


def test_shared_recipes_run_once_and_are_not_run_again(bench, capsys):
    code, rows, told = claims(bench, capsys, "run", "c1", "c2", *SUBJECT)
    assert code == 0 and sorted((bench / "ran").read_text()) == ["0", "1", "2"]
    assert {name: row["verdict"] for name, row in rows.items()} == {"c1": "holds", "c2": "holds"}
    assert "2/3" in told and "for c1, c2" in told
    code, rows, told = claims(bench, capsys, "run", "c1", "c2", *SUBJECT)
    assert (bench / "ran").read_text() == "" and rows["c2"]["verdict"] == "holds" and "is recorded" in told
    code, rows, told = claims(bench, capsys, "c1", "c2", "--from", "results")
    assert code == 0 and rows["c1"]["given"] == SUBJECT
    assert [row["verdict"] for row in rows.values()] == ["holds", "holds"]
    code, rows, told = claims(bench, capsys, "run", "c1", *SUBJECT, "corpus.seed=1")  # another setting: runs of its own
    assert sorted((bench / "ran").read_text()) == ["0", "1"]
    found = judge.from_records(chosen(["c1"], [str(bench / "mine")]), read_records("results"), "cpu")
    assert [row.verdict for row in found] == ["holds", "holds"] and found[0].place.given != found[1].place.given


def test_a_failing_run_leaves_its_claim_inconclusive_and_the_others_judged(bench, capsys):
    code, rows, told = claims(bench, capsys, "run", "c1", "c3", *SUBJECT)
    assert code == 1 and rows["c1"]["verdict"] == "holds"
    assert rows["c3"]["verdict"] == "inconclusive" and rows["c3"]["reason"] == "memory: out_of_memory: too much"
    claims(bench, capsys, "run", "c3", *SUBJECT)
    assert (bench / "ran").read_text() == ""  # it would end so again
    assert claims(bench, capsys, "run", "c5", *SUBJECT)[1]["c5"]["verdict"] == "inconclusive"
    assert claims(bench, capsys, "run", "c5", *SUBJECT)[1]["c5"]["verdict"] == "does not hold"
    assert (bench / "ran").read_text() == "5"  # a crash says nothing about the recipe


def test_a_time_limit_starts_no_further_run(bench, capsys, monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(session.time, "monotonic", lambda: next(now))
    code, rows, told = claims(bench, capsys, "run", "c1", "c2", *SUBJECT, "--seconds", "250")
    assert len((bench / "ran").read_text()) < 3 and "runs were not started" in told


def test_runs_come_in_the_order_that_decides_most_claims_soonest():
    uses = {"big": {"a": "1", "b": "2", "c": "3"}, "small": {"a": "3"}, "pair": {"a": "3", "b": "4"}}
    made = session.Session([replace(of(name)) for name in uses], HERE, dict.fromkeys("1234"), uses)  # type: ignore
    assert made.missing() == ["3", "4", "1", "2"]


def test_rounds_repeat_only_what_is_timed_and_did_not_fail():
    figures = [{**FILE["figures"][0], "formula": "b.step_time_s / c.step_time_s - a.peak_memory_bytes"}]
    claim = of("c", recipes={"a": [], "b": ["seed=1"], "c": ["seed=2"]}, figures=figures)
    made = session.Session([claim], HERE, dict.fromkeys("123"), {"c": {"a": "1", "b": "2", "c": "3"}})  # type: ignore
    assert made.missing(3) == ["1", "2", "3", "2", "3", "2", "3"]
    made.records = {"2": [{"status": "ok"}], "3": [{"status": "out_of_memory"}]}
    assert made.missing(2) == ["1", "2"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["c1", "model=micro"], "write `dyno claims run`"),
        (["run", "c9"], "there is no claim 'c9'"),
        (["run", "c1", "modle=nano"], "did you mean model"),
        (["run", "c1", "--from", "results"], "--from judges records"),
        (["c1", "--to", "table.xlsx"], "a .md or a .json file"),
    ],
)
def test_mistakes_are_one_line(bench, capsys, words, told):
    code, _, shown = claims(bench, capsys, *words)
    assert code == 2 and told in shown.splitlines()[-1]


def test_markdown_and_json_files(bench, capsys):
    claims(bench, capsys, "run", "c1", *SUBJECT, "--to", "out/claims.md")
    text = (bench / "out" / "claims.md").read_text()
    assert "| c1 | half the memory | **holds** | memory | 0.98× to 1× | 0.990099× |" in text and "`hardware=cpu" in text
    claims(bench, capsys, "c1", "--to", "claims.json")
    assert json.loads((bench / "claims.json").read_text())["verdicts"] == {"holds": 1}
