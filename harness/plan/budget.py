"""What so many tokens cost: time, energy, carbon and money, from a predicted rate and the stated prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyno.measure.hardware import quantity
from dyno.measure.nvml import NotMeasured

DRAWN = 0.9  # of the power limit, by a GPU that trains (one H100: 0.94 at model=1b)


@dataclass(frozen=True)
class Budget:
    """Predicted totals; an empty figure has its reason in `reasons`. `relative_error` is the step time's: all that follows
    from it has at least as much."""

    tokens: float
    hours: float
    gpus: int
    energy_kwh: float | None
    carbon_kg: float | None
    cost_usd: float | None
    reasons: dict[str, str]
    relative_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"label": "predicted", **vars(self)}


def budget(
    tokens: float, tokens_per_s: float, gpus: int, hardware: Mapping[str, Any], relative_error: float | None = None
) -> Budget:
    """Totals of a training run on `gpus` devices that together reach `tokens_per_s`."""
    hours = tokens / tokens_per_s / 3600
    reasons: dict[str, str] = {}

    def stated(key: str, names: tuple[str, ...]) -> float | None:
        try:
            return quantity(hardware, key)[0]
        except NotMeasured as error:
            reasons.update(dict.fromkeys(names, str(error)))
            return None

    limit = hardware.get("power_limit_w")
    pue = stated("pue", ("energy_kwh", "carbon_kg"))
    energy = gpus * float(limit) * DRAWN * pue * hours / 1000 if limit and pue else None
    if not limit:
        reasons |= dict.fromkeys(("energy_kwh", "carbon_kg"), "hardware.power_limit_w is not stated")
    grid, price = stated("grid_gco2_per_kwh", ("carbon_kg",)), stated("price_usd_per_hour", ("cost_usd",))
    cost = gpus * hours * price if price is not None else None
    if cost is not None and not hardware.get("price_includes_energy"):
        kwh_price = stated("kwh_price_usd", ("cost_usd",))
        cost = cost + energy * kwh_price if energy is not None and kwh_price is not None else None
    carbon = energy * grid / 1000 if energy is not None and grid is not None else None
    return Budget(tokens, hours, gpus, energy, carbon, cost, reasons, relative_error)
