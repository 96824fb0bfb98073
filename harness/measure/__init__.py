"""Measurement: windows, clocks, memory, power, carbon, cost, validity, environment, statistics.

`window`, `clock`, `warmup`, `memory` and `probe` import torch and belong to the worker; the other modules do not, so
that the parent process and the sampler stay light. Whatever cannot be measured says so with a reason (`NotMeasured`, or
a Metric whose value is None).
"""
