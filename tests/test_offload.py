"""Offload on a CPU, where the same code copies plainly: the plain step's weights, in fewer resident bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dyno.errors import RunFailure, Unsupported, UserError
from dyno.measure.environment import Device
from dyno.plan import predict
from dyno.recipe import groups
from dyno.stages import train
from dyno.techniques.offload import _files
from dyno.techniques.offload._files import FileState
from dyno.techniques.offload._host import ALIGN, HostState, Layout
from dyno.techniques.offload._side import Side

CPU = Device("cpu", 0, "a CPU", 2**36, None, None, 1)
STREAM = np.tile(np.arange(20), 20)
WORKLOAD = {"batch": 4, "seq": 12, "lr": 1e-3}
STATES = ["optimizer", "nvme", "parameters"]
ALL = [*STATES, "activations"]
CASES = {
    "plain": [],
    "accumulated": ["accumulation=gradients", "accumulation.micro_batches=4"],
    "bf16": ["precision=bf16"],
    "recomputed": ["checkpointing=uniform", "checkpointing.every=2"],
    "selective": ["checkpointing=selective"],
    "tied": [],
}


def prepared(directory, *overrides, device=tiny.CPU, **changes):
    model = tiny.model(sharpness=3.0, **{"layers": 5, "tied_embeddings": False, **changes}).train()
    pipeline = tiny.pipeline(directory, "workload.batch=4", "workload.seq=12", "attention=math", *overrides)
    pipeline.device = device
    on_host = any(t.weights_on_host for chosen in pipeline.recipe.techniques.values() for t in chosen)
    return train.prepared_run(pipeline, model if on_host else model.to(device))


def trained(run, steps=5):
    """Losses of some steps, and the state that is saved of them."""
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    losses = []
    for _ in range(steps):
        trainer.step()
        losses.append(trainer.finite_loss())
    return losses, {name: value.detach().clone() for name, value in run.part("state_dict")().items()}, trainer


def small(option):
    """Pieces and thresholds at which a tiny model takes several of each."""
    return {"activations": ["offload=activations", "offload.min_kib=1"]}.get(option) or [f"offload={option}"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {
        case: trained(prepared(tmp_path_factory.mktemp("plain"), *overrides, tied_embeddings=case == "tied"))
        for case, overrides in CASES.items()
    }


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch):
    """Pieces of a thousand numbers, so that parameters are cut and files have many; of a large model fifty pieces.

    A piece costs a parallel region, which takes a millisecond where threads outnumber free cores.
    """

    def few(numbers):
        return max(1000, numbers // 50)

    host, file = HostState.__init__, FileState.__init__
    monkeypatch.setattr(HostState, "__init__", lambda self, n, chunk, side: host(self, n, few(n), side))
    monkeypatch.setattr(FileState, "__init__", lambda self, d, n, chunk, side: file(self, d, n, few(n), side))


@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("case", CASES)
def test_five_steps_end_at_the_plain_step_s_weights(option, case, plain, tmp_path):
    run = prepared(tmp_path, *CASES[case], *small(option), tied_embeddings=case == "tied")
    losses, state, _ = trained(run)
    assert losses == pytest.approx(plain[case][0], abs=1e-6)
    assert losses[-1] < losses[0] - 0.05
    assert state.keys() == plain[case][1].keys()
    for name, wanted in plain[case][1].items():
        torch.testing.assert_close(state[name], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("option", ALL)
def test_evaluation_and_costs_work_between_steps(option, plain, tmp_path):
    run = prepared(tmp_path, *small(option))
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    costs = train.step_costs(run, trainer, seed=0)
    assert costs["activation_bytes"].value > 0 and costs["recomputed_flops"].value == 0
    for _ in range(5):
        trainer.step()
        with torch.no_grad():
            logits = run.part("forward")(tiny.tokens(2, 9))
    assert trainer.finite_loss() == pytest.approx(plain["plain"][0][-1], abs=1e-6)
    model = tiny.model(layers=5, tied_embeddings=False)
    model.load_state_dict(run.part("state_dict")())
    torch.testing.assert_close(model(tiny.tokens(2, 9)), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", STATES)
def test_gradients_do_not_stay_and_the_norm_is_that_of_the_whole(option, tmp_path):
    run, expected = prepared(tmp_path, *small(option)), prepared(tmp_path)
    tokens, targets = tiny.tokens(4, 13)[:, :-1], tiny.tokens(4, 13)[:, 1:]
    norms = []
    for prepared_run in (run, expected):
        trainer = train.Trainer(prepared_run, STREAM, WORKLOAD, seed=0)
        prepared_run.part("gradients")(tokens, targets)
        left = [p.grad is not None for p in trainer.parameters]
        assert all(left) if prepared_run is expected else not any(left)
        norms.append(float(prepared_run.part("clip")(trainer.parameters, 0.5)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.5


def test_blocks_are_on_the_device_only_while_they_compute(tmp_path):
    run = prepared(tmp_path, *small("parameters"))
    trainer = train.Trainer(run, STREAM, WORKLOAD, seed=0)
    visitors = trainer.optimizer.stream.visitors
    here = []

    def count(*_):
        here.append(sum(v.buffer.untyped_storage().nbytes() > 0 for v in visitors))

    for block in run.model.blocks:
        block.mlp.register_forward_hook(count)
        block.mlp.down_proj.weight.register_post_accumulate_grad_hook(count)
    trainer.step()
    assert len(here) == 10 and set(here) <= {1, 2} and 2 in here
    count()
    assert here[-1] == 0


# Files


def sweeps(state, rounds=3):
    """Add 1, 2, 3 to the three kinds each round; what the last round found."""
    found = {}
    for _ in range(rounds):
        for start, *kinds in state.sweep(lambda: None):
            found[start] = [kind.clone() for kind in kinds]
            for i, kind in enumerate(kinds):
                kind += (i + 1) * torch.arange(start, start + len(kind))
    return [torch.cat([found[s][i] for s in sorted(found)]) for i in range(3)]


@pytest.mark.parametrize("numbers", [1, 1023, 1024, 5000, 9001])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_keeps_what_steps_wrote(numbers, direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
        monkeypatch.setattr(_files, "_open", lambda d, n, real=_files._open: (real(d, n)[0], False))
    state = FileState(tmp_path, numbers, 1000, Side(tiny.CPU))
    kinds = sweeps(state)
    for i, kind in enumerate(kinds):
        torch.testing.assert_close(kind, 2.0 * (i + 1) * torch.arange(numbers))
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing is left of it
    assert state.bytes == 12 * 1024 * -(-numbers // 1024)


def test_a_file_system_without_direct_io_gets_an_ordinary_file(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, *rest))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    state = FileState(tmp_path, 5000, 1000, Side(tiny.CPU))
    assert not state.direct and list(tmp_path.iterdir()) == []
    assert float(sweeps(state)[0][-1]) == 2 * 4999


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"GiB of optimizer state: No space left"):
        train.Trainer(prepared(tmp_path, "offload=nvme", f"offload.path={tmp_path}"), STREAM, WORKLOAD, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_disk_that_fails_in_a_step_is_a_typed_failure(call, tmp_path, monkeypatch):
    state = FileState(tmp_path, 9001, 1000, Side(tiny.CPU))
    sweeps(state)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunFailure, match="optimizer's state failed: Input/output error"):
        sweeps(state)


def test_the_record_says_how_the_page_cache_was_kept_out(tmp_path):
    run = prepared(tmp_path, *small("nvme"))
    trained(run, steps=1)
    assert run.details["page_cache"] in ("bypassed", "dropped")
    assert run.details["disk_bytes_per_step"] % (2 * 12 * 1024) == 0


# Reasons and predictions


def reasons(*overrides):
    return predict(tiny.pipeline(Path("."), *overrides).recipe, CPU).reasons


@pytest.mark.parametrize("option", ALL)
def test_what_does_not_go_together_is_told_before_any_work(option, tmp_path):
    assert not reasons(f"offload={option}")
    assert "measures no training" in reasons(f"offload={option}", "workload=generate")[0]
    for layout in ("ddp", "zero3"):
        split = [f"parallelism={layout}", "parallelism.dp=2", "workload.batch=4"]
        (reason,) = (r for r in reasons(f"offload={option}", *split) if "2 ranks hold, gather and reduce" in r)
        assert "take parallelism=none, or offload=none and a layout that shards" in reason
        assert not reasons("offload=none", *split)
    assert not reasons(f"offload={option}", "parallelism=ddp", "parallelism.dp=1", "workload.batch=4")
    if option in STATES:
        assert "loss scaling" in reasons(f"offload={option}", "precision=fp16")[0]
        assert "1 MiB" in reasons(f"offload={option}", "offload.chunk_mib=0")[0]
        with pytest.raises(Unsupported, match="loss scaling"):
            prepared(tmp_path, f"offload={option}", "precision=fp16")
    if option in ("parameters", "activations"):
        assert "compile=off" in reasons(f"offload={option}", "compile=on")[0]


@pytest.mark.parametrize("choice", [f"{axis}={o}" for axis in ("precision", "optimizer") for o in groups()[axis]])
@pytest.mark.parametrize("option", STATES)
def test_the_plan_and_the_run_refuse_the_same(option, choice, tmp_path):
    """The other axes' own reasons apart: some formats do not run on a CPU, but can be set up for one step there."""
    overrides = [choice, f"offload={option}"]
    recipe = tiny.pipeline(tmp_path, *overrides).recipe
    planned = recipe.techniques["offload"][0].unsupported(recipe, CPU)
    assert planned is None or any(r.startswith(f"offload={option}: {planned}") for r in reasons(*overrides))
    said = None
    try:
        trained(prepared(tmp_path, *overrides), steps=1)
    except Unsupported as refusal:
        said = str(refusal)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert (planned is None) == (said is None), (planned, said)


def test_files_say_where_there_is_no_room(tmp_path, monkeypatch):
    assert "no directory that can be written" in reasons("offload=nvme", f"offload.path={tmp_path}/none")[0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert "GiB free" in reasons("offload=nvme", f"offload.path={tmp_path}", "model=160m")[0]


def test_another_rule_is_not_stepped_on_the_host(tmp_path):
    run = prepared(tmp_path)
    run.parts["optimizer"] = lambda model, lr: torch.optim.SGD(model.parameters(), lr)
    recipe = tiny.pipeline(tmp_path, "offload=optimizer").recipe
    recipe.techniques["offload"][0].apply(run)
    with pytest.raises(Unsupported, match="SGD"):
        train.Trainer(run, STREAM, WORKLOAD, seed=0)


def test_predictions_order_the_tiers():
    def plan(option):
        made = predict(tiny.pipeline(Path("."), "model=1b", "workload.batch=1", f"offload={option}").recipe, CPU)
        return made.peak_memory_bytes

    assert 1.5 * plan("parameters") < plan("optimizer") < 0.6 * plan("none")
    assert plan("nvme") == plan("optimizer")
    assert plan("activations") <= plan("none")


def test_parameters_lie_apart_and_pieces_find_them():
    layout = Layout([torch.nn.Parameter(torch.zeros(n)) for n in (5, 64, 65, 1)])
    assert layout.starts == [0, 64, 128, 256] and layout.numbers == 320 and ALIGN == 64
    found = list(layout.within(100, 200))
    assert found == [(1, slice(36, 64), slice(0, 28)), (2, slice(0, 65), slice(28, 93))] or found[0][1] == slice(36, 64)


def test_a_piece_looks_at_its_own_parameters_only():
    """Not at all of them: a large model has as many pieces as parameters."""
    layout = Layout([torch.nn.Parameter(torch.zeros(n)) for n in (5, 64, 65, 1, 300, 2)])
    for width in (1, 7, 64, 100, 1000):
        for start in range(0, layout.numbers, width):
            wanted = set(range(start, start + width))
            for index, part, place in layout.within(start, start + width):
                slot = layout.slot(index)
                assert slot.start + part.start == start + place.start and part.stop <= layout.sizes[index]
                wanted -= set(range(start + place.start, start + place.stop))
            assert not wanted & {n for i in range(6) for n in range(*layout.slot(i).indices(layout.numbers))}


@pytest.mark.parametrize(("option", "case"), [(o, c) for o in STATES for c in ("plain", "bf16")])
def test_only_what_travels_is_pinned(option, case, tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(Side, "pin", lambda self, tensor: pinned.append(tensor) or tensor)
    run = prepared(tmp_path, *CASES[case], *small(option))
    optimizer = train.Trainer(run, STREAM, WORKLOAD, seed=0).optimizer
    numbers, inside = (
        optimizer.layout.numbers,
        sum(-(-p.numel() // ALIGN) * ALIGN for p in run.model.blocks.parameters()),
    )
    masters = 3 * optimizer.flat.buffers[0].nbytes if option == "nvme" else 4 * numbers
    if (option, case) == ("parameters", "bf16"):
        masters -= 2 * inside  # blocks travel as 16 bits, and their masters not at all
    assert sum(t.nbytes for t in pinned) == 4 * numbers + masters
    assert not any(t.dtype == torch.bfloat16 for t in pinned) or option == "parameters"


# On a GPU: the same weights, and memory that is really gone


@pytest.mark.gpu
@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("case", ["plain", "accumulated", "bf16", "recomputed"])
def test_on_a_gpu_five_steps_end_at_the_plain_step_s_weights(option, case, tmp_path):
    device = torch.device("cuda", 0)
    expected, wanted, _ = trained(prepared(tmp_path, *CASES[case], device=device))
    losses, state, _ = trained(prepared(tmp_path, *CASES[case], *small(option), device=device))
    tolerance = 1e-2 if case == "bf16" else 1e-5
    assert losses == pytest.approx(expected, abs=tolerance)
    for name, value in wanted.items():
        torch.testing.assert_close(state[name].cpu(), value.cpu(), atol=tolerance, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ALL)
def test_on_a_gpu_less_stays(option, tmp_path):
    device, sizes = torch.device("cuda", 0), {"layers": 12, "hidden": 512, "ffn_width": 2048, "head_dim": 128}
    peaks = {}
    for name in ("none", option):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        overrides = small(name) if name != "none" else []
        run = prepared(tmp_path, "precision=bf16", *overrides, device=device, **sizes)
        trainer = train.Trainer(
            run, STREAM, {**WORKLOAD, "batch": 64 if option == "activations" else 8, "seq": 128}, seed=0
        )
        for _ in range(3):
            trainer.step()
        peaks[name] = torch.cuda.max_memory_allocated(device) - base
        del run, trainer
    assert peaks[option] < (0.75 if option != "activations" else 0.9) * peaks["none"]
