"""What a configuration may ask of the machine: numbers of GPUs, told when the recipe is composed.

    ${gpus:}          as many as are visible        ${gpus:8}     eight times that
    ${gpus_left:2,4}  the share that 2 x 4 leave, 0 where those do not divide them
    ${gpu_divisors:}  1,2,4,8 of eight

A machine without a GPU counts as two: its processor runs as many ranks as one likes, and a layout takes two at least. Of
hardware that is stated and not here one machine counts.
"""

from __future__ import annotations

import math
from typing import Any

from omegaconf import OmegaConf

from dyno.errors import UserError

PROCESSES = 2  # in the place of GPUs


def count(root: Any) -> int:
    from dyno.measure.environment import detect, planned

    try:
        device = detect(root["hardware"])
    except UserError:  # of hardware that is not here, which can be planned for, one machine
        if not (stated := planned(root["hardware"])):
            raise
        return stated.node or stated.count
    return device.count if device.kind == "cuda" else PROCESSES


def gpus(times: int = 1, *, _root_: Any) -> int:
    return int(times) * count(_root_)


def gpus_left(*degrees: int, _root_: Any) -> int:
    there = count(_root_)
    if any(type(degree) is not int or degree < 1 for degree in degrees):
        raise UserError(f"parallel degrees are whole numbers of at least 1, not {', '.join(str(d) for d in degrees)}")
    share, rest = divmod(there, math.prod(degrees))
    return 0 if rest else share


def gpu_divisors(*, _root_: Any) -> str:
    there = count(_root_)
    return ",".join(str(n) for n in range(1, there + 1) if there % n == 0)


def register() -> None:
    for resolver in (gpus, gpus_left, gpu_divisors):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
