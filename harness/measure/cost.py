"""Money: the price of the device's hours, and of its electricity where the price does not include it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyno.measure.carbon import JOULES_PER_KWH
from dyno.measure.hardware import quantity
from dyno.measure.nvml import NotMeasured
from dyno.record import Metric, unmeasured


def energy_cost_usd(energy_j: float, pue: float, kwh_price_usd: float) -> float:
    """Dollars for `energy_j` joules drawn by the device, the building's share included."""
    return energy_j / JOULES_PER_KWH * pue * kwh_price_usd


def rent_usd(seconds: float, price_usd_per_hour: float) -> float:
    return seconds / 3600 * price_usd_per_hour


def cost_metric(seconds: float, energy: Metric, hardware: Mapping[str, Any]) -> Metric:
    """What `seconds` on one device cost.

    A rented device's price includes its electricity (`price_includes_energy`, the default). For an owned one set it to
    false: the price an hour is then the depreciation, and the electricity is added at kwh_price_usd times PUE.
    """
    try:
        price, source = quantity(hardware, "price_usd_per_hour")
        cost = rent_usd(seconds, price)
        if not hardware.get("price_includes_energy", True):
            if energy.value is None:
                return unmeasured("USD", f"the price excludes electricity, and there is no energy: {energy.reason}")
            cost += energy_cost_usd(energy.value, quantity(hardware, "pue")[0], quantity(hardware, "kwh_price_usd")[0])
    except NotMeasured as error:
        return unmeasured("USD", str(error))
    return Metric(cost, "USD", source=source)


def cost_per_mtok_metric(cost: Metric, tokens: float | None) -> Metric:
    """Dollars for a million tokens."""
    if cost.value is None:
        return unmeasured("USD/Mtok", str(cost.reason))
    if not tokens:
        return unmeasured("USD/Mtok", "the window counted no tokens")
    return Metric(cost.value / tokens * 1e6, "USD/Mtok", source=cost.source)
