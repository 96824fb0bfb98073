"""The command line: exit codes, what goes to which stream, and what a cheap verb must not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dyno import cli, runner

HEAVY = ("torch", "pandas", "hydra", "omegaconf", "numpy", "optuna", "altair", "pyarrow")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for records, and a worker that ends at once as its seed says: 0 is ok, 1 runs out of memory."""
    monkeypatch.setenv("DYNO_HOME", str(tmp_path / "home"))
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        from pathlib import Path
        directory = Path(sys.argv[1])
        seed = json.loads((directory / "request.json").read_text())["recipe"]["config"]["seed"]
        speed = {"value": 100.0 + seed, "unit": "token/s", "count": 3, "low": 90.0, "high": 110.0}
        result = {"status": "ok", "metrics": {"tokens_per_s": speed}}
        if seed == 1:
            result = {"status": "out_of_memory", "reason": "too much | of it"}
        (directory / "result.json").write_text(json.dumps(result))
        """)
    )
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-S", str(script)])
    return str(tmp_path / "results")


def run_cases(results: str, *seeds: int) -> None:
    for seed in seeds:
        cli.main(["run", "hardware=cpu", "workload=data", f"results_dir={results}", f"seed={seed}"])


def test_help_of_every_verb_has_examples_and_is_cheap():
    """In one process: every --help, then a look at what was imported."""
    code = textwrap.dedent(f"""
        import contextlib, io, sys
        from dyno import cli
        for verb in [[], *([v] for v in cli.VERBS)]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                cli.main([*verb, "--help"])
            assert not verb or "examples:" in out.getvalue() and "dyno " + verb[0] in out.getvalue(), verb
        print([name for name in {HEAVY!r} if name in sys.modules])
    """)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (shown.stdout.strip(), shown.returncode) == ("[]", 0), shown.stderr


def test_parent_verbs_import_no_torch(results):
    code = textwrap.dedent(f"""
        import sys
        from dyno import cli
        cli.main(["plan", "hardware=cpu", "workload=generate", "quantization=int8", "results_dir={results}"])
        cli.main(["list", "quantization"])
        assert "torch" not in sys.modules, "torch was imported"
    """)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_run_ends_with_one_json_document(results, capsys):
    code = cli.main(["run", "hardware=cpu", "workload=data", f"results_dir={results}"])
    shown = capsys.readouterr()
    record = json.loads(shown.out.strip().splitlines()[-1])
    assert code == 0 and record["status"] == "ok" and record["metrics"]["tokens_per_s"]["value"] == 100.0
    assert Path(record["_path"], "record.json").is_file()
    assert "tokens_per_s" in shown.err and "workload=data" in shown.err


def test_a_failed_run_is_exit_code_1_with_its_reason(results, capsys):
    assert cli.main(["run", "hardware=cpu", "workload=data", f"results_dir={results}", "seed=1"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["status"] == "out_of_memory" and "too much | of it" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "quantization=int9"],
        ["run", "quantization=int8,int4"],
        ["sweep", "workload.lr=interval(0,1)"],
        ["sweep", "seed=0,1", "quantization=int9"],
        ["plan", "model.layers=abc"],
        *[[verb, f"{size}=0"] for verb in ("run", "sweep", "plan") for size in ("workload.batch", "model.layers")],
        ["tune", "study=quickstart", "workload.seq=0"],
        ["tune", "study=quickstart", "workload.batch=0,8"],
        ["run", "--plugins", "/nonexistent"],
        ["table", "/nonexistent"],
        ["compare", "/nonexistent/a", "/nonexistent/b"],
        ["list", "quantizaton"],
        ["cache", "--prune", "--older-than", "soon"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(results, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", lambda *a, **k: pytest.fail("work was begun"))
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("dyno: ") and shown.err.count("\n") == 1


def test_no_verb_and_unknown_verb(capsys):
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["drive"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("dyno: argument VERB: invalid choice: 'drive'")
    assert cli.main(["--version"]) == 0 and "dyno " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [("tune study=quickstart --report r.html study.trials=3", "overrides", ["study=quickstart", "study.trials=3"]),
     ("claims run ddp-scaling --seconds 60 model=160m", "words", ["run", "ddp-scaling", "model=160m"]),
     ("plan --tokens 1e9 model=1b", "overrides", ["model=1b"])],
)  # fmt: skip
def test_overrides_may_stand_behind_an_option(line, name, words):
    assert getattr(cli.parsed(line.split()), name) == words


@pytest.mark.parametrize(
    "line", ["table a b", "tune study=quickstart --reprot r.html", "run model=nano --report r.html"]
)
def test_what_no_verb_takes_is_a_mistake(line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    told = capsys.readouterr().err
    assert (
        end.value.code == 2 and "unrecognized arguments" in told and told.startswith("dyno: ") and told.count("\n") == 1
    )


def test_interrupt_is_exit_code_130(results, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert cli.main(["run", "hardware=cpu", "workload=data", f"results_dir={results}"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_sweep_runs_every_combination_and_goes_on_after_a_failure(results, capsys):
    words = ["hardware=cpu", "workload=data", f"results_dir={results}"]
    assert cli.main(["sweep", "seed=0,1,2", "mixture=natural,equal", *words]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in rows] == ["ok"] * 2 + ["out_of_memory"] * 2 + ["ok"] * 2
    assert [r["overrides"][:2] for r in rows][:2] == [["seed=0", "mixture=natural"], ["seed=0", "mixture=equal"]]
    assert cli.main(["sweep", "seed=0,2", *words]) == 0


def test_table_to_every_form(results, tmp_path, capsys):
    run_cases(results, 0, 1, 2)
    capsys.readouterr()
    assert cli.main(["table", results]) == 0
    text = capsys.readouterr().out
    assert "out_of_memory" in text and "too much" in text and "tokens_per_s" in text
    assert cli.main(["table", results, "--to", "csv"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    assert cli.main(["table", results, "--to", "md"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert cli.main(["table", results, "--columns", "id,tokens_per_s", "--to", "csv"]) == 0
    assert capsys.readouterr().out.startswith("id,tokens_per_s\n")
    assert cli.main(["table", results, "--columns", "speed"]) == 2
    assert cli.main(["table", results, "--to", "parquet"]) == 2
    assert cli.main(["table", results, "--to", "parquet", "-o", str(tmp_path / "t.parquet")]) == 0
    import pandas as pd

    assert sorted(pd.read_parquet(tmp_path / "t.parquet")["tokens_per_s"].dropna()) == [100.0, 102.0]


def test_an_empty_table(tmp_path, capsys):
    assert cli.main(["table", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out


def test_list_shows_groups_options_knobs_and_plugins(tmp_path, capsys):
    (tmp_path / "conf" / "pruning").mkdir(parents=True)
    (tmp_path / "conf" / "pruning" / "mine.yaml").write_text("# of my own\n_target_: mine.Mine\namount: 3\n")
    assert cli.main(["list"]) == 0
    plain = capsys.readouterr().out
    assert "quantization" in plain and "mine" not in plain
    assert cli.main(["list", "pruning", "--plugins", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "pruning=mine" in shown and "of my own" in shown and "pruning.amount=3" in shown


def test_cache_lists_and_prunes(tmp_path, capsys):
    from dyno.artifacts import Store

    Store(tmp_path / "artifacts").put("train", "some-key", lambda d: {})
    assert cli.main(["cache", str(tmp_path)]) == 0 and "some-key" in capsys.readouterr().out
    assert cli.main(["cache", str(tmp_path), "--prune", "--older-than", "1h"]) == 0
    assert "removed 0" in capsys.readouterr().out
    assert cli.main(["cache", str(tmp_path), "--prune"]) == 0 and "removed 1" in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback():
    """`dyno list | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    shown = subprocess.run([sys.executable, "-m", "dyno.cli", "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in shown.stderr and "Exception ignored" not in shown.stderr
