"""Where a window stands under the machine's two ceilings: arithmetic and memory traffic. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyno.measure.hardware import peak_flop_per_s, quantity
from dyno.measure.nvml import NotMeasured
from dyno.record import Metric, unmeasured


def roofline_fraction(flops: float, traffic_bytes: float, seconds: float, matrix: float, copy: float) -> float:
    """The achieved FLOP/s over what the roofline allows at this intensity: min(matrix, intensity x copy).

    Equal to the least possible time over the actual one: max(flops / matrix, bytes / copy) / seconds.
    """
    return max(flops / matrix, traffic_bytes / copy) / seconds


def roofline_metrics(
    flops: float | None,
    traffic_bytes: float | None,
    seconds: float,
    dtype: str,
    hardware: Mapping[str, Any],
    ceilings: Mapping[str, Any] | None,
) -> dict[str, Metric]:
    """mfu, mbu, arithmetic_intensity and roofline_fraction of a window.

    Args:
        flops: floating-point operations of the whole window; traffic_bytes: bytes that it must move to and from memory.
        dtype: of the matrix products (fp32, tf32, bf16, fp16, ...).
        hardware: mfu and mbu are shares of the vendor's peaks where it states them, else of the measured ceilings; the
            metric's source says which.
        ceilings: from `probe.ceilings`; roofline_fraction is always a share of these. None if there was no need.
    """
    out: dict[str, Metric] = {}
    matrix, copy = _measured(ceilings, dtype)
    peak: float | None
    bandwidth: float | None
    if not flops:
        out["mfu"] = unmeasured("", "the window counted no FLOPs")
    else:
        try:
            peak, source = peak_flop_per_s(hardware, dtype)
        except NotMeasured as error:
            peak, source = matrix, "measured ceiling"
            reason = f"{error}, and no {dtype} ceiling was measured"
        out["mfu"] = Metric(flops / seconds / peak, "", source=source) if peak else unmeasured("", reason)
    if not traffic_bytes:
        out["mbu"] = unmeasured("", "the window counted no bytes")
    else:
        try:
            bandwidth, source = quantity(hardware, "peak_byte_per_s")
        except NotMeasured as error:
            bandwidth, source = copy, "measured ceiling"
            reason = f"{error}, and no bandwidth was measured"
        used = traffic_bytes / seconds
        out["mbu"] = Metric(used / bandwidth, "", source=source) if bandwidth else unmeasured("", reason)
    if not flops or not traffic_bytes:
        missing = "the window counted no FLOPs" if not flops else "the window counted no bytes"
        return out | {
            "arithmetic_intensity": unmeasured("FLOP/B", missing),
            "roofline_fraction": unmeasured("", missing),
        }
    out["arithmetic_intensity"] = Metric(flops / traffic_bytes, "FLOP/B", source="counted")
    if matrix and copy:
        share = roofline_fraction(flops, traffic_bytes, seconds, matrix, copy)
        out["roofline_fraction"] = Metric(share, "", source="measured ceilings")
    else:
        out["roofline_fraction"] = unmeasured("", f"no ceiling for {dtype} was measured on this machine")
    return out


def _measured(ceilings: Mapping[str, Any] | None, dtype: str) -> tuple[float | None, float | None]:
    if ceilings is None:
        return None, None
    return ceilings["matrix_flop_per_s"].get(dtype), ceilings["copy_byte_per_s"]
