"""Clipping and AdamW on parts of sharded tensors, against PyTorch's own on whole ones. As a program, it forks the ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dyno.stages import shards

RANKS, STEPS, LARGEST = 4, 4, 0.5
SHAPES = [(8, 6), (5, 7), (3,), (1,), (9, 4)]  # uneven, and some of which a rank has nothing
PLACES = [
    (Shard(0), Replicate()),
    (Replicate(), Shard(0)),
    (Replicate(), Replicate()),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
]


def values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(parameters: list, place) -> list:
    """Norms of some clipped steps of AdamW on the parameters, whose gradients `place` puts where they belong."""
    optimizer = shards.adamw(parameters, 1e-2, (0.9, 0.95), 0.1)
    norms = []
    for step in range(STEPS):
        for p, gradient in zip(parameters, values(step + 1), strict=True):
            p.grad = place(p, gradient)
        parameters[1].grad = None if step == 1 else parameters[1].grad
        norms.append(float(shards.clip(parameters, LARGEST if step else 1e3)))
        optimizer.step()
    return norms


def work(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "tp"))
    plain = [torch.nn.Parameter(t) for t in values(0)]
    split = [torch.nn.Parameter(distribute_tensor(t, mesh, at)) for t, at in zip(values(0), PLACES, strict=True)]
    expected = stepped(plain, lambda p, gradient: gradient)
    norms = stepped(split, lambda p, gradient: shards.like(gradient, p))
    assert torch.allclose(torch.tensor(norms), torch.tensor(expected), rtol=1e-6)
    for one, other in zip(plain, split, strict=True):
        assert isinstance(other, DTensor) and torch.allclose(shards.whole(other), one, atol=1e-7)
        moments = shards.adamw([other], 1e-2, (0.9, 0.95), 0.1)
        other.grad = shards.like(torch.ones_like(one), other)
        moments.step()
        twin, fused = other.detach().clone(), shards.SplitAdamW([other], lr=1e-2, betas=(0.9, 0.95), fused=True)
        assert not fused._step_supports_amp_scaling  # else overflowing steps were taken
        fused.step()
        wholes = [torch.nn.Parameter(shards.whole(twin))]
        wholes[0].grad = torch.ones_like(one)
        torch.optim.AdamW(wholes, lr=1e-2, betas=(0.9, 0.95)).step()
        assert torch.allclose(shards.whole(other), wholes[0], atol=1e-6)
        assert moments.state[other]["exp_avg"].placements == other.placements  # as checkpoints write them


def test_parts_are_clipped_and_stepped_as_wholes_are(tmp_path: Path) -> None:
    ranks.run_program(__file__, tmp_path, 120)


def test_plain_tensors_are_pytorchs_business() -> None:
    parameters, copies = ([torch.nn.Parameter(t) for t in values(0)] for _ in "ab")
    reference = torch.optim.AdamW(copies, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    norms = stepped(parameters, lambda p, gradient: gradient)
    for step in range(STEPS):
        for p, gradient in zip(copies, values(step + 1), strict=True):
            p.grad = gradient
        copies[1].grad = None if step == 1 else copies[1].grad
        assert norms[step] == float(torch.nn.utils.clip_grad_norm_(copies, LARGEST if step else 1e3))
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


if __name__ == "__main__":
    ranks.fork(RANKS, work, Path(sys.argv[1]), 100)
