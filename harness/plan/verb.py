"""`dyno plan`: one recipe here, or the best layouts on many GPUs; then failures, pooled memory and money of either."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyno import show
from dyno.errors import UserError
from dyno.home import home
from dyno.measure.environment import detect, planned
from dyno.measure.hardware import resolve
from dyno.plan import Plan, predict, shape_of, tables
from dyno.plan.budget import budget
from dyno.plan.cluster import PUBLISHED_ERROR, TAKEN_OVER, cluster_of, in_flight
from dyno.plan.collectives import collectives, verdict
from dyno.plan.memory import parameter_width, state_width
from dyno.plan.pooled import pooled, remote_of, touches
from dyno.plan.resilience import Job, failures_of, resilience, storage_of
from dyno.plan.search import Candidate, as_recipes, best_layouts, ineffective, parse
from dyno.plan.settings import tokens as tokens_of
from dyno.technique import combined

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from dyno.recipe import Recipe

CHECKPOINT_BYTES = 14.0  # a parameter: bf16 weight, fp32 master, Adam's two moments


@dataclass(frozen=True)
class Asked:
    """What the flags ask for beside the plan; None where they do not."""

    gpus: int | None
    tokens: float | None
    failures: dict[str, float] | None
    remote: dict[str, float] | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Asked:
        """Every flag read before any work.

        Raises:
            UserError: a flag that says nothing.
        """
        return cls(
            gpus=None if (text := arguments.search) is None else parse(text),
            tokens=None if (text := arguments.tokens) is None else tokens_of(text),
            failures=None if (text := arguments.elastic) is None else failures_of(text),
            remote=None if (text := arguments.remote_memory) is None else remote_of(text),
        )


def plan(recipe: Recipe, arguments: argparse.Namespace) -> bool:
    """Predict and print; the last line on stdout is one JSON document. Whether the recipe can run.

    Raises:
        UserError: a flag that says nothing, or asks for what the recipe or its hardware does not state.
    """
    asked = Asked.of(arguments)
    if arguments.calibrate:
        from dyno.plan.calibrate import from_records

        for found in from_records(arguments.calibrate):
            show.calibration(found)
        print(
            f"kept in {home() / 'plan'} for later plans; without that folder they are uncalibrated again",
            file=sys.stderr,
        )
    if asked.gpus:
        print(json.dumps(searched(recipe, asked.gpus, asked)))
        return True
    device = planned(recipe.config["hardware"]) or detect(recipe.config["hardware"])
    hardware, prediction = resolve(recipe.config["hardware"], device.kind, device.name), predict(recipe, device)
    check(asked, prediction, hardware)
    show.plan(prediction)
    print(json.dumps(prediction.to_json() | extras(recipe, prediction, hardware, asked)))
    return prediction.verdict() is None


def check(asked: Asked, prediction: Plan, hardware: Mapping[str, Any]) -> None:
    """What is asked of one recipe needs its predicted step; nothing is shown before that is known."""
    flags = {"--tokens": asked.tokens, "--elastic": asked.failures, "--remote-memory": asked.remote}
    wanted = [flag for flag, value in flags.items() if value is not None]
    if wanted and (not prediction.step_s or prediction.shape is None):
        raise UserError(f"{wanted[0]} needs a predicted step: a training recipe and hardware whose peaks are stated")
    if asked.failures:
        storage_of(hardware)


def searched(recipe: Recipe, gpus: int, asked: Asked) -> dict[str, Any]:
    """The best layouts of a recipe's model, the best one's collectives, and what else was asked of it."""
    shape, hardware = shape_of(recipe), recipe.config["hardware"]
    if asked.failures:
        storage_of(hardware)
    if shape is None or recipe.config["workload"]["measures"] != "train":
        raise UserError("--search is for training: add workload=train")
    if idle := ineffective(recipe):
        raise UserError(
            f"--search chooses what it says of every layout itself, and {' '.join(idle)} would change nothing: leave it out, and "
            "plan a layout that it prints with it"
        )
    dtype = "bf16" if (hardware.get("peak_flop_per_s") or {}).get("bf16") else "fp16"
    cluster, device = cluster_of(hardware, dtype), planned(hardware)
    assert device is not None, "hardware that states a node states its memory"
    quickest, looked, fitting = best_layouts(shape, gpus, cluster)
    print(f"{fitting} layouts fit; the quickest are planned as recipes, which takes some seconds", file=sys.stderr)
    found, refused = as_recipes(recipe, quickest, shape.batch, dtype, device)
    show.layouts(found, looked, fitting, refused)
    tables.error(cluster.generation)
    best = found[0]
    wires = collectives(shape, best.layout, cluster)
    tables.collectives(wires, cluster)
    out: dict[str, Any] = {
        "label": "predicted",
        "relative_error": {"time": PUBLISHED_ERROR, "taken_over_from": TAKEN_OVER.get(cluster.generation)},
        "best": [c.to_json() for c in found],
        "refused_as_recipe": refused,
        "collectives": [wire.to_json() for wire in wires],
        "synchronisation": verdict(wires),
    }
    out["budget"] = money(asked.tokens, best.tokens_per_s, gpus, hardware, PUBLISHED_ERROR)
    if asked.failures:
        layout = best.layout
        job = Job(
            math.ceil(gpus / cluster.node), gpus, best.tokens_per_s, CHECKPOINT_BYTES * shape.parameters,
            math.ceil(layout.tp * layout.pp * layout.cp / cluster.node),
        )  # fmt: skip
        out["elastic"] = failing(job, asked.failures, hardware, asked.tokens)
    if asked.remote:
        out["remote_memory"] = far(best.bytes, *rounds(best, shape.batch), best.step_s, asked.remote)
    return out


def rounds(best: Candidate, batch: int) -> tuple[float, float]:
    """(micro-batches a rank works through, those in flight at once)."""
    count = batch // (best.layout.dp * best.layout.micro)
    return count, in_flight(best.layout, count)


def extras(recipe: Recipe, prediction: Plan, hardware: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Money, failures and pooled memory of one recipe, as far as they were asked for."""
    if not prediction.step_s or prediction.shape is None:
        return {}
    rate, out = prediction.tokens_per_step / prediction.step_s, {}
    if asked.tokens:
        out["budget"] = money(asked.tokens, rate, prediction.ranks, hardware, prediction.time_band)
    if asked.failures:
        nodes = math.ceil(prediction.ranks / int((hardware.get("node") or {"gpus": 1})["gpus"]))
        state = prediction.shape.parameters * checkpoint_bytes(recipe, prediction)
        out["elastic"] = failing(Job(nodes, prediction.ranks, rate, state), asked.failures, hardware, asked.tokens)
    if asked.remote:
        state_of = dict(prediction.terms["optimizer step"])
        state_of["activations"] = prediction.terms["forward end"]["activations"]
        count = float(prediction.shape.micro_batches)
        out["remote_memory"] = far(state_of, count, 1.0, prediction.step_s, asked.remote)
    return out


def checkpoint_bytes(recipe: Recipe, prediction: Plan) -> float:
    """Bytes of a parameter in a checkpoint: weight, master and optimizer state as the recipe holds them."""
    assert prediction.shape is not None
    prints = combined(
        t.footprint(prediction.shape, prediction.device) for chosen in recipe.techniques.values() for t in chosen
    )
    return parameter_width(prints) + state_width(prints) + prints.master_bytes


def money(
    tokens: float | None, rate: float, gpus: int, hardware: Mapping[str, Any], relative_error: float
) -> dict[str, Any] | None:
    if not tokens:
        return None
    total = budget(tokens, rate, gpus, hardware, relative_error)
    show.budget(total)
    return total.to_json()


def failing(
    job: Job, failures: Mapping[str, float], hardware: Mapping[str, Any], tokens: float | None
) -> dict[str, Any]:
    found = resilience(job, failures, hardware, tokens)
    tables.resilience(found)
    return found.to_json()


def far(
    state: Mapping[str, float], count: float, alive: float, step_s: float, remote: Mapping[str, float]
) -> dict[str, Any]:
    found = pooled(state, touches(count, alive), step_s, remote)
    tables.pooled(found)
    return found.to_json()
