"""Metric names to units, directions and SI-prefixed text: one place, used by reports, compare and constraints."""

from __future__ import annotations

import math

# Units by the end of a metric's name, longest first; a record's own unit wins over this guess.
_SUFFIXES = (
    ("_tokens_per_s", "tokens/s"),
    ("tokens_per_s", "tokens/s"),
    ("_usd_per_mtok", "USD/Mtoken"),
    ("_j_per_token", "J/token"),
    ("_bytes", "B"),
    ("_usd", "USD"),
    ("_s", "s"),
    ("_j", "J"),
    ("_w", "W"),
    ("_g", "g"),
)
# Units that take an SI prefix, with the smallest and largest exponent that a reader expects.
_PREFIXED = {
    "B": (0, 12),
    "s": (-9, 0),
    "J": (-6, 9),
    "W": (-3, 6),
    "g": (-6, 6),
    "Hz": (0, 9),
    "FLOP": (0, 18),
    "FLOP/s": (0, 18),
    "B/s": (0, 15),
    "tokens/s": (0, 12),
    "J/token": (-9, 6),
    "parameters": (0, 12),
}
_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
_ALIASES = {
    "bytes": "B",
    "byte": "B",
    "seconds": "s",
    "joules": "J",
    "watts": "W",
    "tok/s": "tokens/s",
    "token/s": "tokens/s",
    "$": "USD",
    "bit": "bits",
}
# Unit words that say "a plain number": nothing is printed behind the figure.
_PLAIN = {"", "1", "ratio", "fraction", "count", "nats", "x", "dimensionless"}

_HIGHER = {"mfu", "mbu", "arithmetic_intensity", "roofline_fraction", "top1_agreement", "sparsity"}
_HIGHER_PARTS = ("per_pass", "accuracy", "acceptance", "agreement", "goodput")


def unit_of(metric: str, unit: str | None = None) -> str:
    """The unit of a metric, normalised ("bytes" is "B"); guessed from the name where the record names none."""
    if unit is None:
        unit = "parameters" if metric == "parameters" else next((u for s, u in _SUFFIXES if metric.endswith(s)), "")
    unit = _ALIASES.get(unit, unit)
    return "" if unit in _PLAIN else unit


def direction_of(metric: str) -> str:
    """'maximize' for rates and utilisations, 'minimize' for times, bytes, energy, money and losses."""
    rate = metric.endswith("_per_s") and not metric.startswith("time")
    higher = rate or metric in _HIGHER or any(part in metric for part in _HIGHER_PARTS)
    return "maximize" if higher else "minimize"


def kind_of(metric: str) -> str:
    """What a change of a metric is called: speed, size, quality or amount."""
    unit = unit_of(metric)
    if unit in ("s", "tokens/s"):
        return "speed"
    if unit in ("B", "parameters") or metric in ("bits_per_weight",):
        return "size"
    if metric in ("validation_loss", "train_loss", "perplexity", "kl_divergence", "top1_agreement"):
        return "quality"
    return "amount"


def prefix(value: float, unit: str) -> tuple[float, str]:
    """The factor and the SI prefix under which `value` reads as 1 to 999, within what the unit takes."""
    bounds = _PREFIXED.get(unit)
    if bounds is None or value == 0 or not math.isfinite(value):
        return 1.0, ""
    exponent = 3 * math.floor(math.log10(abs(value) * (1 + 1e-9)) / 3)
    exponent = min(max(exponent, bounds[0]), bounds[1])
    return 10.0**exponent, _PREFIXES[exponent]


def digits(value: float, significant: int = 4) -> str:
    """A number with the given significant digits, no exponent where a reader can do without one."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 <= magnitude < 9:
        return f"{value:.{significant - 1}e}"
    return f"{value:,.{max(significant - 1 - magnitude, 0)}f}".replace(",", "\u202f")


def apart(a: float, b: float, decimals: int = 1) -> tuple[str, str]:
    """Two numbers with so many decimals, or as many more as tell them apart: ('23.52', '23.48')."""
    for places in range(decimals, 12):
        texts = f"{a:.{places}f}", f"{b:.{places}f}"
        if texts[0] != texts[1]:
            break
    return texts


def quantity(value: float | None, unit: str = "", significant: int = 4) -> str:
    """'12.31 ktokens/s', '8.05 GB', '3.142'; an empty string where there is no value."""
    if value is None or not math.isfinite(value):
        return ""
    if unit == "USD":
        return f"${digits(value, significant)}"
    factor, letter = prefix(value, unit)
    text = digits(value / factor, significant)
    shown = letter if unit == "parameters" else f"{letter}{unit}"
    return f"{text} {shown}" if shown else text


def ratio_text(ratio: float, low: float | None = None, high: float | None = None) -> str:
    """'1.62× (1.58–1.66)'; near 1 a digit more, for that is where it is read closely: '1.004× (0.998–1.009)'."""
    text = f"{_near(ratio)}×"
    return text if low is None or high is None else f"{text} ({_near(low)}–{_near(high)})"


def _near(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.9 < ratio < 1.1 else digits(ratio, 3)
