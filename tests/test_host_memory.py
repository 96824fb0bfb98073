"""Host memory that a device copies from and to, locked to the byte and unlocked in time, and models that move there."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
import tiny
import torch

from dyno import host_memory
from dyno.errors import RunFailure
from dyno.stages import train


class Runtime:
    """A CUDA runtime that notes what is locked, and reads it when it is unlocked."""

    def __init__(self, error=0):
        self.error, self.locked, self.read = error, {}, []

    def cudaHostRegister(self, begin, size, flags):
        self.locked[begin] = size
        return self.error

    def cudaHostUnregister(self, begin):
        self.read.append(ctypes.string_at(begin, self.locked.pop(begin)))


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_pages_are_locked_to_the_byte_and_unlocked_before_their_memory_goes(runtime):
    whole = host_memory.zeros(5000)
    assert whole.data_ptr() % 4096 == 0 and not whole.any()
    whole.fill_(1)
    host_memory.pin(whole[:1025])
    host_memory.pin(whole[4096:])
    assert list(runtime.locked.values()) == [8192, 4096]
    view = whole.view(50, 100)[1]
    del whole
    gc.collect()
    assert len(runtime.locked) == 2 and view.sum() == 100
    del view
    gc.collect()
    assert not runtime.locked and sorted(len(b) for b in runtime.read) == [4096, 8192]
    assert {b[:4] for b in runtime.read} == {np.float32(1).tobytes()}


def test_memory_that_cannot_be_pinned_is_a_typed_failure(runtime):
    runtime.error = 2
    with pytest.raises(RunFailure, match=r"0\.0 GiB of host memory cannot be pinned: CUDA error 2"):
        host_memory.pin(host_memory.zeros(5))


def test_a_model_drawn_module_by_module_is_whole():
    config = tiny.config(tied_embeddings=True, qk_norm=True)
    model = train.drawn_on_device(config, 3, tiny.CPU, tiny.CPU)
    assert model.lm_head.weight is model.embed.weight and not any(p.is_meta for p in model.parameters())
    assert model.blocks[1].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.norm.weight, torch.ones(32))
    assert torch.equal(model.inverse_frequency, tiny.model().inverse_frequency)
    assert model(tiny.tokens(1, 5)).isfinite().all()


def test_a_drawn_model_moves_to_another_home_as_it_is(monkeypatch):
    config, moved = tiny.config(tied_embeddings=True), []
    wanted = train.drawn_on_device(config, 3, tiny.CPU, tiny.CPU)
    monkeypatch.setattr(host_memory, "copied", lambda w: moved.append(w) or w.clone())
    found = train.drawn_on_device(config, 3, tiny.CPU, torch.device("cpu", 0))  # not the same to a comparison
    assert len(moved) == len(list(wanted.parameters())) and found.lm_head.weight is found.embed.weight
    for one, other in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
