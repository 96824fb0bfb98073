"""The command line: verbs through argparse, overrides in Hydra's grammar. Imports nothing heavy before a verb runs."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dyno.recipe import Recipe

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


EXAMPLES = {
    "run": """  dyno run model=nano precision=bf16
  dyno run workload=generate quantization=int8 decoding=speculative""",
    "sweep": """  dyno sweep quantization=none,int8,int4 attention=math,sdpa workload=generate
  dyno sweep 'workload.batch=8,16,32'""",
    "tune": """  dyno tune study=quickstart
  dyno tune study=quickstart model=160m study.trials=24
  dyno tune study=quickstart precision=fp32,bf16 'workload.lr=interval(1e-4,1e-2)'""",
    "plan": """  dyno plan model=8b workload.batch=8 workload.seq=4096 checkpointing=uniform
  dyno plan model=1b hardware=h100
  dyno plan model=8b hardware=h100 precision=bf16 workload=generate
  dyno plan --calibrate results model=160m precision=bf16
  dyno plan model=1b hardware=h100 precision=bf16 compile=on --tokens 1e11
  dyno plan model=70b hardware=h100 workload.batch=1024 workload.seq=8192 --search gpus=256
  dyno plan model=70b hardware=h100_racks workload.batch=1024 workload.seq=8192 --search gpus=256
  dyno plan model=70b hardware=h100 workload.batch=1024 workload.seq=8192 --search gpus=256 \\
      --elastic failures=1.4,repair=24h,restart=10m --tokens 1e12
  dyno plan model=1b hardware=h100 precision=bf16 --remote-memory gb_per_s=64,slower=5%""",
    "claims": """  dyno claims                                    # every claim, with what is known of it
  dyno claims run model=160m measure=probe --repeats 3 --seconds 270 --to claims.md
  dyno claims --from results/reference/cpu-2core/claims""",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"dyno: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="dyno",
        description="A dynamometer for LLM optimisation: compose a recipe, run it, compare, tune, report.",
        epilog="overrides are Hydra's: axis=option, axis.knob=value; `dyno list` shows them, `dyno VERB --help` examples.",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, help: str, examples: str, overrides: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="axis=option or axis.knob=value")
            sub.add_argument(
                "--plugins",
                action="append",
                default=[],
                metavar="DIR",
                help="a directory with conf/ and modules of your own techniques; its code will run",
            )
        return sub

    verb("run", "run one recipe; the last line on stdout is its record as JSON", EXAMPLES["run"], True)
    verb("sweep", "run every combination of a sweep", EXAMPLES["sweep"], True)
    tune = verb(
        "tune", "search recipes with Optuna; a killed study resumes with the same command", EXAMPLES["tune"], True
    )
    tune.add_argument("--report", metavar="FILE", help="write an HTML report of the study's runs at the end")
    plan = verb(
        "plan", "predict what a recipe needs, and why it cannot run, without running it", EXAMPLES["plan"], True
    )
    plan.add_argument("--calibrate", metavar="DIR", help="first fit the predictions to the training runs in DIR")
    plan.add_argument("--tokens", metavar="N", help="time, energy, carbon and money of training on N tokens")
    plan.add_argument(
        "--search",
        metavar="gpus=N",
        help="the best layouts of the model on N GPUs of the stated hardware, and what crosses which link",
    )
    plan.add_argument(
        "--elastic", metavar="failures=N,...",
        help="what N failures a node and year make of it: fixed, with spare nodes, elastic; also repair=24h, restart=10m",
    )  # fmt: skip
    plan.add_argument(
        "--remote-memory", metavar="gb_per_s=N,...",
        help="the state that may lie behind a link of N GB/s; also slower=5%%, latency_us=2, overlap=50%%",
    )  # fmt: skip
    claims = verb("claims", "published figures, and whether they hold here", EXAMPLES["claims"])
    claims.add_argument("words", nargs="*", metavar="[run] CLAIM OVERRIDE", help="`run` runs what has no record yet")
    claims.add_argument("--from", dest="directory", metavar="DIR", help="judge by the records there (default: results)")
    claims.add_argument("--seconds", type=float, metavar="N", help="with run: start no run later than this")
    claims.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="with run: so many runs of every recipe whose time is judged",
    )
    claims.add_argument("--to", metavar="FILE", help="write the table to a .md or .json file")
    claims.add_argument(
        "--plugins", action="append", default=[], metavar="DIR", help="a directory with claims of your own"
    )
    table = verb(
        "table",
        "records as a table",
        "  dyno table\n  dyno table results --to csv\n  dyno table results --to parquet -o runs.parquet",
    )
    table.add_argument("directory", nargs="?", default="results", help="results directory (default: results)")
    table.add_argument("--to", choices=("text", "md", "csv", "parquet"), default="text")
    table.add_argument("-o", "--output", help="file to write; parquet needs one")
    table.add_argument("--columns", help="comma-separated columns; default: what differs, and the main metrics")
    compare = verb("compare", "two tables, runs or directories side by side, ratios with intervals",
                   "  dyno compare results/runs/A results/runs/B\n  dyno compare before/ after/ --json")  # fmt: skip
    compare.add_argument("a")
    compare.add_argument("b")
    compare.add_argument("--force", action="store_true", help="compare rows whose fingerprints differ")
    compare.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    report = verb(
        "report",
        "one self-contained HTML file (or Markdown) from records",
        "  dyno report results -o report.html\n  dyno report results -o summary.md",
    )
    report.add_argument("directory", nargs="?", default="results")
    report.add_argument("-o", "--output", default="report.html", help="a .html or .md file (default: report.html)")
    report.add_argument("--title", default="Dyno report")
    report.add_argument(
        "--constraint",
        action="append",
        default=[],
        help="such as 'peak_memory_bytes <= 8 GiB' or 'perplexity <= 1.01 * baseline'",
    )
    report.add_argument("--baseline", metavar="ID", help="the run that ratios are taken over; default: the plainest")
    listing = verb("list", "axes, options and knobs", "  dyno list\n  dyno list quantization\n  dyno list model")
    listing.add_argument("group", nargs="?")
    listing.add_argument("--plugins", action="append", default=[], metavar="DIR")
    cache = verb("cache", "list or prune artifacts", "  dyno cache\n  dyno cache --prune --older-than 7d")
    cache.add_argument("directory", nargs="?", default="results")
    cache.add_argument("--prune", action="store_true")
    cache.add_argument("--older-than", default="0d", help="with --prune: unused for so long (12h, 7d; default: all)")
    doctor = verb(
        "doctor",
        "what this machine has, what it reaches, and what is missing",
        "  dyno doctor\n  dyno doctor --refresh",
    )
    doctor.add_argument("--refresh", action="store_true", help="measure the ceilings again")
    return top


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The command line, whose overrides may also stand behind an option: argparse alone takes one stretch of them."""
    top = parser()
    arguments, late = top.parse_known_args(argv)
    name = next((name for name in ("overrides", "words") if hasattr(arguments, name)), None)
    if late and (name is None or any(word.startswith("-") for word in late)):
        top.error(f"unrecognized arguments: {' '.join(late)}")
    if name and late:
        setattr(arguments, name, [*getattr(arguments, name), *late])
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    from dyno.errors import UserError

    try:
        if arguments.version:
            from dyno import __version__

            print(f"dyno {__version__}")
            return OK
        if not arguments.verb:
            parser().print_help()
            return USAGE
        return VERBS[arguments.verb](arguments)
    except UserError as error:
        print(f"dyno: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as stop:
        print(f"\ndyno: interrupted{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return OK


class Progress:
    """Progress lines: one line rewritten on a terminal, at most one every few seconds elsewhere."""

    def __init__(self, prefix: str = ""):
        self.prefix, self.started, self.told = prefix, time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        line = f"{self.prefix}[{now - self.started:5.1f} s] {text}"
        if self.live:
            print(f"\r\x1b[2K{line[:110]}", end="", file=sys.stderr, flush=True)
        elif now - self.told > 5.0 or not self.told:
            self.told = now
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    from dyno.composition import parse
    from dyno.errors import UserError
    from dyno.recipe import compose

    for override in parse(arguments.overrides):
        if override.is_sweep_override():
            raise UserError(f"'{override.input_line}' names several values: use `dyno sweep` or `dyno tune`")
    return compose(arguments.overrides, arguments.plugins)


def run(arguments: argparse.Namespace) -> int:
    import json

    from dyno import runner, show

    recipe, progress = recipe_of(arguments), Progress()
    record = runner.run(recipe, progress=progress)
    progress.end()
    show.record(record)
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, default=str))
    return OK if record["status"] == "ok" else FAILED


def sweep(arguments: argparse.Namespace) -> int:
    import json

    from dyno import runner, show
    from dyno.recipe import compose, expand

    recipes = [compose(overrides, arguments.plugins) for overrides in expand(arguments.overrides)]
    records = []
    for i, recipe in enumerate(recipes, 1):
        progress = Progress(f"{i}/{len(recipes)} ")
        records.append(runner.run(recipe, progress=progress))
        progress.end()
        print(f"{i}/{len(recipes)}  {show.line(records[-1])}", file=sys.stderr)
    show.rows(records)
    print(json.dumps([{"id": r["id"], "status": r["status"], "overrides": r["overrides"]} for r in records]))
    return OK if all(r["status"] == "ok" for r in records) else FAILED


def tune(arguments: argparse.Namespace) -> int:
    import json

    from dyno import study

    progress = Progress()
    summary = study.tune(arguments.overrides, arguments.plugins, progress)
    progress.end()
    if arguments.report:
        from dyno import report

        report.write(
            summary["results_dir"], arguments.report, title=summary["name"],
            constraints=summary["constraints"], objectives=[tuple(o) for o in summary["objectives"]],
            baseline_id=baseline["id"] if (baseline := summary["baseline"]) and baseline["status"] == "ok" else None,
        )  # fmt: skip
        print(f"report: {arguments.report}", file=sys.stderr)
    print(json.dumps(summary, default=str))
    return OK


def plan(arguments: argparse.Namespace) -> int:
    from dyno.plan import verb

    return OK if verb.plan(recipe_of(arguments), arguments) else FAILED


def claims(arguments: argparse.Namespace) -> int:
    import json

    from dyno.claims import main, show

    given = arguments.words, arguments.directory, arguments.plugins, arguments.seconds, arguments.repeats
    rows, ended_well = main.main(*given, Progress)
    print(show.text(rows), file=sys.stderr)
    show.write(rows, arguments.to)
    print(json.dumps(show.to_json(rows)))
    return OK if ended_well else FAILED


def table(arguments: argparse.Namespace) -> int:
    from dyno import record, show
    from dyno.errors import UserError

    frame = record.table(arguments.directory)
    if arguments.columns:
        wanted = arguments.columns.split(",")
        missing = [c for c in wanted if c not in frame]
        if missing:
            raise UserError(f"there is no column {missing[0]}; there is {', '.join(frame.columns)}")
        frame = frame[wanted]
    if arguments.to == "parquet":
        if not arguments.output:
            raise UserError("--to parquet needs -o FILE")
        frame.to_parquet(arguments.output)
    else:
        text = show.frame_text(frame, arguments.to, all_columns=bool(arguments.columns))
        if arguments.output:
            with open(arguments.output, "w") as file:
                file.write(text)
        else:
            print(text)
    return OK


def compare(arguments: argparse.Namespace) -> int:
    import json

    from dyno.compare import compare as side_by_side

    comparison = side_by_side(arguments.a, arguments.b, force=arguments.force)
    print(json.dumps(comparison.to_json()) if arguments.json else comparison.text())
    return OK


def report(arguments: argparse.Namespace) -> int:
    from dyno import report as reporting

    reporting.write(
        arguments.directory,
        arguments.output,
        title=arguments.title,
        constraints=arguments.constraint,
        baseline_id=arguments.baseline,
    )
    print(arguments.output)
    return OK


def listing(arguments: argparse.Namespace) -> int:
    from dyno import show

    show.options(arguments.group, arguments.plugins)
    return OK


def cache(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from dyno import runner, show
    from dyno.artifacts import Store

    store = Store(Path(arguments.directory) / "artifacts")
    if arguments.prune:
        gone = store.prune(show.seconds(arguments.older_than))
        runner.clean_leftovers(arguments.directory)
        print(f"removed {len(gone)} artifacts, {show.si(sum(r['bytes'] for r in gone), 'B')}")
    else:
        show.artifacts(store.entries())
    return OK


def doctor(arguments: argparse.Namespace) -> int:
    from dyno import doctor as checks

    return checks.main(refresh=arguments.refresh)


VERBS: dict[str, Any] = {
    "run": run, "sweep": sweep, "tune": tune, "plan": plan, "claims": claims, "table": table, "compare": compare,
    "report": report, "list": listing, "cache": cache, "doctor": doctor,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
