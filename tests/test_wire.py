"""Counting what goes over the wire leaves a step as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

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


@pytest.fixture
def two_ranks() -> Iterator[dist.ProcessGroup]:
    """The first of two ranks, whose messages go nowhere."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_messages_of_compiled_code_are_counted_as_they_are_without_a_compiler(two_ranks):
    def step(x: torch.Tensor) -> torch.Tensor:
        whole = collectives.all_gather_tensor(collectives.all_reduce(x, "sum", two_ranks), 0, two_ranks)
        return collectives.reduce_scatter_tensor(whole * 2, "sum", 0, two_ranks) + 1

    x, compiled, rows = torch.ones(4, 8), torch.compile(step, backend="aot_eager"), []
    compiled(x)
    for call in (step, compiled):
        with Wire() as wire:
            call(x)
        rows.append(wire.rows({}))
    assert rows[0] == rows[1]
    assert {row["kind"]: row["payload_bytes"] for row in rows[0]} == {
        "all_reduce": 128, "all_gather": 256, "reduce_scatter": 256,
    }  # fmt: skip
