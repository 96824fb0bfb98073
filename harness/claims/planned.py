"""What a claim's plans predict, as named quantities: arithmetic only, nothing is run.

A plan is a mapping of
    numbers: stated figures by name, for arithmetic on them.
    recipe: overrides with hardware that states its memory; alone: what `dyno plan` predicts for one rank.
    layout: degrees of parallelism; then what the cluster model predicts for a step of the recipe's model.
    gpus: a number; then the same for the best layout on so many of the stated GPUs.
    largest: a whole-number knob of the model; then sizes of the largest model that the device holds, by bisection.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from dyno.errors import UserError
from dyno.recipe import Recipe, close, compose

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.plan.search import Candidate

KEYS = {"numbers", "recipe", "layout", "gpus", "largest"}
MOST = 1 << 14  # of the knob that `largest` grows


def quantities(plan: dict[str, Any], where: str) -> dict[str, float]:
    """Every quantity of a plan by name; bytes, seconds and USD in plain units.

    Raises:
        UserError: the plan's recipe states no device, or its layout does not fit together.
    """
    found = {name: float(value) for name, value in (plan.get("numbers") or {}).items()}
    if "recipe" not in plan:
        return found
    recipe, device = stated(tuple(plan["recipe"]), where)
    if "layout" in plan or "gpus" in plan:
        return found | on_cluster(recipe, plan, where)
    if "largest" in plan:
        return found | largest(recipe, device, plan["largest"], where)
    return found | on_one_rank(recipe, device)


@cache
def stated(overrides: tuple[str, ...], where: str) -> tuple[Recipe, Device]:
    """A recipe and the device that its hardware option states, whatever this machine has."""
    from dyno.measure.environment import planned

    recipe = compose(list(overrides))
    device = planned(recipe.config["hardware"])
    if device is None:
        raise UserError(f"{where}: a plan needs stated hardware, such as hardware=h100")
    return recipe, device


def on_one_rank(recipe: Recipe, device: Device) -> dict[str, float]:
    """Sizes, the largest of each memory term over a step's phases, and time."""
    from dyno.plan import predict

    plan = predict(recipe, device)
    assert plan.shape is not None
    found = {
        "parameters": plan.shape.parameters, "device_bytes": device.memory_bytes, "host_bytes": plan.host_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes, "needed_bytes": plan.needed_bytes, "bubble": plan.bubble,
        "flops_per_step": plan.flops_per_step, "wire_bytes": plan.wire_bytes_per_step, "ranks": plan.ranks,
    }  # fmt: skip
    for terms in plan.terms.values():
        for name, value in terms.items():
            key = f"{name.replace(' ', '_')}_bytes"
            found[key] = max(found.get(key, 0.0), value)
    if plan.step_s:
        found |= {"step_time_s": plan.step_s, "tokens_per_s": plan.tokens_per_step / plan.step_s}
    return found


def on_cluster(recipe: Recipe, plan: dict[str, Any], where: str) -> dict[str, float]:
    """A step of a layout, or of the best one, and an all-reduce of its gradients by one ring and by hosts first."""
    from dyno.plan import shape_of
    from dyno.plan.cluster import Layout, cluster_of, data_group
    from dyno.plan.links import hierarchical_s, merged
    from dyno.plan.search import best_layouts

    shape, hardware = shape_of(recipe), recipe.config["hardware"]
    assert shape is not None
    cluster = cluster_of(hardware)
    if "gpus" in plan:
        found = best_layouts(shape, int(plan["gpus"]), cluster)[0][0]
    else:
        known = asdict(Layout())
        for key in plan["layout"]:
            if key not in known:
                raise UserError(f"{where}: a layout has no '{key}'{close(str(key), known)}")
        found = candidate(recipe, Layout(**plan["layout"]))
    layout, crossed = found.layout, data_group(found.layout, cluster)
    gradients = 4.0 * shape.parameters / (layout.tp * layout.pp)
    return {
        "parameters": shape.parameters, "gpus": layout.gpus, "device_bytes": cluster.memory_bytes,
        "memory_bytes": found.memory_bytes, "step_time_s": found.step_s, "tokens_per_s": found.tokens_per_s,
        "mfu": found.mfu, "tensor_ranks": layout.tp, "gpus_of_a_host": cluster.node,
        "usd_per_gpu_hour": float(hardware["price_usd_per_hour"]["value"]),
        "flat_all_reduce_s": hierarchical_s(merged(crossed), gradients),
        "hierarchical_all_reduce_s": hierarchical_s(crossed, gradients),
        **{f"{name.replace(' ', '_')}_bytes": value for name, value in found.bytes.items()},
        **{f"{name.replace(' ', '_')}_s": value for name, value in found.seconds.items()},
    }  # fmt: skip


def candidate(recipe: Recipe, layout: Any) -> Candidate:
    """The cluster model's prediction for one layout."""
    from dyno.plan import shape_of
    from dyno.plan.cluster import cluster_of, memory_terms, model_flops, time_terms
    from dyno.plan.search import Candidate

    shape = shape_of(recipe)
    assert shape is not None
    cluster = cluster_of(recipe.config["hardware"])
    seconds = time_terms(shape, layout, cluster)
    step = sum(seconds.values())
    mfu = model_flops(shape) / (step * layout.gpus * cluster.flop_per_s)
    return Candidate(layout, seconds, memory_terms(shape, layout), mfu, shape.batch * shape.seq / step)


def largest(recipe: Recipe, device: Device, knob: str, where: str) -> dict[str, float]:
    """The largest model that fits the device, by how far a knob of the model can grow; the host is not asked."""
    from dyno.plan import predict

    model = recipe.config["model"]
    name = knob.removeprefix("model.")
    if type(model.get(name)) is not int:
        raise UserError(f"{where}: largest={knob} is no whole-number knob of the model")

    def sized(count: int) -> Any:
        return predict(Recipe({**recipe.config, "model": {**model, name: count}}, recipe.choices), device)

    low, high = 0, MOST
    while high - low > 1:
        middle = (low + high) // 2
        plan = replace(sized(middle), reasons=[])
        low, high = (middle, high) if plan.verdict() is None else (low, middle)
    if low == 0:
        raise UserError(f"{where}: not even {knob}=1 fits {device.name}")
    return on_one_rank(Recipe({**recipe.config, "model": {**model, name: low}}, recipe.choices), device)
