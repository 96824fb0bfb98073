"""Counting what goes over the wire leaves a step as it is."""

from __future__ import annotations

from typing import Any

import torch

from dyno.measure.wire import Wire


class Layer(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def test_compiled_code_stays_compiled_while_it_is_counted_and_after():
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(len(args))
            return graph.forward(*args)

        return run

    layer = Layer(3, 3)
    layer.compile(backend=backend)
    x = torch.ones(2, 3)
    expected = layer(x)
    with Wire() as wire:
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
    assert len(calls) == 3 and wire.rows({}) == []
