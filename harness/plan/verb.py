"""`dyno plan`: one recipe here, or the best layouts on many GPUs; then failures, pooled memory and money of either."""

from __future__ import annotations

import json
import math
import sys
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
from dyno.plan.pooled import pooled, touches
from dyno.plan.resilience import Job, resilience
from dyno.plan.search import Candidate, as_recipes, best_layouts, ineffective, parse
from dyno.technique import combined

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from dyno.recipe import Recipe

CHECKPOINT_BYTES = 14.0  # a parameter: bf16 weight, fp32 master, Adam's two moments


def plan(recipe: Recipe, arguments: argparse.Namespace) -> bool:
    """Predict and print; the last line on stdout is one JSON document. Whether the recipe can run.

    Raises:
        UserError: a flag that says nothing, or asks for what the recipe or its hardware does not state.
    """
    if arguments.calibrate:
        from dyno.plan.calibrate import from_records

        for found in from_records(arguments.calibrate):
            show.calibration(found)
        print(
            f"kept in {home() / 'plan'} for later plans; without that folder they are uncalibrated again",
            file=sys.stderr,
        )
    if arguments.search:
        print(json.dumps(searched(recipe, arguments)))
        return True
    prediction = predict(recipe, planned(recipe.config["hardware"]) or detect(recipe.config["hardware"]))
    show.plan(prediction)
    print(json.dumps(prediction.to_json() | extras(recipe, prediction, arguments)))
    return prediction.verdict() is None


def searched(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """The best layouts of a recipe's model, the best one's collectives, and what else was asked of it."""
    gpus, shape, hardware = parse(arguments.search), shape_of(recipe), recipe.config["hardware"]
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
    show.layouts(found, looked, fitting, refused, [c.layout.overrides(shape.batch, dtype) for c in found])
    tables.error(cluster.generation)
    best = found[0]
    wires = collectives(shape, best.layout, cluster)
    tables.collectives(wires, cluster)
    out: dict[str, Any] = {
        "label": "predicted",
        "relative_error": {"time": PUBLISHED_ERROR, "taken_over_from": TAKEN_OVER.get(cluster.generation)},
        "best": [{**c.to_json(), "overrides": c.layout.overrides(shape.batch, dtype)} for c in found],
        "refused_as_recipe": refused,
        "collectives": [wire.to_json() for wire in wires],
        "synchronisation": verdict(wires),
    }
    out["budget"] = money(arguments.tokens, best.tokens_per_s, gpus, hardware, PUBLISHED_ERROR)
    if arguments.elastic:
        layout = best.layout
        job = Job(
            math.ceil(gpus / cluster.node), gpus, best.tokens_per_s, CHECKPOINT_BYTES * shape.parameters,
            math.ceil(layout.tp * layout.pp * layout.cp / cluster.node),
        )  # fmt: skip
        out["elastic"] = failing(job, arguments, hardware)
    if arguments.remote_memory:
        out["remote_memory"] = far(best.bytes, *rounds(best, shape.batch), best.step_s, arguments.remote_memory)
    return out


def rounds(best: Candidate, batch: int) -> tuple[float, float]:
    """(micro-batches a rank works through, those in flight at once)."""
    count = batch // (best.layout.dp * best.layout.micro)
    return count, in_flight(best.layout, count)


def extras(recipe: Recipe, prediction: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Money, failures and pooled memory of one recipe, as far as they were asked for."""
    asked = [flag for flag in ("elastic", "remote_memory") if getattr(arguments, flag)]
    if not prediction.step_s or prediction.shape is None:
        if asked:
            flag = asked[0].replace("_", "-")
            raise UserError(f"--{flag} needs a predicted step: a training recipe and hardware whose peaks are stated")
        return {}
    device = prediction.device
    hardware = resolve(recipe.config["hardware"], device.kind, device.name)
    rate, out = prediction.tokens_per_step / prediction.step_s, {}
    if arguments.tokens:
        out["budget"] = money(arguments.tokens, rate, prediction.ranks, hardware, prediction.time_band)
    if arguments.elastic:
        nodes = math.ceil(prediction.ranks / int((hardware.get("node") or {"gpus": 1})["gpus"]))
        state = prediction.shape.parameters * checkpoint_bytes(recipe, prediction)
        out["elastic"] = failing(Job(nodes, prediction.ranks, rate, state), arguments, hardware)
    if arguments.remote_memory:
        state_of = dict(prediction.terms["optimizer step"])
        state_of["activations"] = prediction.terms["forward end"]["activations"]
        count = float(prediction.shape.micro_batches)
        out["remote_memory"] = far(state_of, count, 1.0, prediction.step_s, arguments.remote_memory)
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


def failing(job: Job, arguments: argparse.Namespace, hardware: Mapping[str, Any]) -> dict[str, Any]:
    found = resilience(job, arguments.elastic, hardware, arguments.tokens)
    tables.resilience(found)
    return found.to_json()


def far(state: Mapping[str, float], count: float, alive: float, step_s: float, text: str) -> dict[str, Any]:
    found = pooled(state, touches(count, alive), step_s, text)
    tables.pooled(found)
    return found.to_json()
