"""What a layout says before it runs: why it cannot, how stages are cut, and what it keeps, sends and waits for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from dyno.measure.environment import planned
from dyno.measure.hardware import options
from dyno.plan import predict, shape_of
from dyno.recipe import compose
from dyno.technique import Shape
from dyno.techniques.parallelism import _cost, _stages
from dyno.techniques.parallelism._rules import ring_backend
from dyno.techniques.parallelism.mesh import Mesh

SHAPE = Shape(138e6, 138e6, 12, 768, 3072, 12, 12, 64, 32000, 16, 1024)
SMALL = ["model=nano", "model.vocab_size=264", "workload.batch=16", "workload.seq=128"]


def device(kind="cpu", count=1):
    return SimpleNamespace(
        kind=kind, count=count, name="a device", memory_bytes=10**12, capability=(9, 0), uuid=None, node=None
    )


def reason(tmp_path, layout, *overrides, on=None):
    return layout.unsupported(tiny.pipeline(tmp_path, *SMALL, *overrides).recipe, on or device())


@pytest.mark.parametrize(
    ("layout", "overrides", "words"),
    [
        (Mesh(dp=2), ["workload=data"], "measure training or inference"),
        (Mesh(dp=0), [], "parallelism.dp=0: it takes 1 or more"),
        (Mesh(ep=2), [], "parallelism.ep=2: this decoder has no experts"),
        (Mesh(dp=2, zero=4), [], "parallelism.zero=4: it takes 0"),
        (Mesh(dp=4, replicate=2), [], "set parallelism.zero to 1, 2 or 3"),
        (Mesh(dp=4, zero=3, replicate=3), [], "cannot make parallelism.replicate=3 equal groups"),
        (Mesh(dp=4, zero=3, reshard_to=3), [], "a divisor of the 4 sharding ranks"),
        (Mesh(dp=4, zero=2, reshard_to=2), [], "with parallelism.zero=3"),
        (Mesh(dp=4, tp=2, zero=3, reshard_to=2), [], "take parallelism.reshard_to=0, or parallelism.tp=1"),
        (Mesh(pp=2, schedule="2f2b"), [], "it takes gpipe, 1f1b, interleaved, zero_bubble, zbv"),
        (Mesh(cp=2, context="star"), [], "it takes ring, ulysses"),
        (Mesh(dp=3), [], "workload.batch=16 cannot be split over parallelism.dp=3"),
        (Mesh(dp=2, pp=2, micro_batches=16), [], "parallelism.dp=2 x 16 micro-batches"),
        (Mesh(tp=3), [], "model.heads=4 cannot be split over parallelism.tp=3"),
        (Mesh(tp=4), [], "model.kv_heads=2 cannot be split over parallelism.tp=4"),
        (Mesh(tp=2), ["model.ffn_width=383"], "model.ffn_width=383"),
        (Mesh(tp=2), ["model.vocab_size=265"], "model.vocab_size=265 cannot be split over parallelism.tp=2; 266 can"),
        (Mesh(tp=2), ["workload.seq=127"], "parallelism.sequence_parallel=false"),
        (Mesh(tp=2), [], "must lie inside one machine"),
        (Mesh(dp=2), [], "2 ranks need as many GPUs, this machine has 1"),
        (Mesh(pp=8), [], "model.layers=4 are fewer than parallelism.pp=8"),
        (Mesh(pp=2, schedule="interleaved", virtual_stages=3), [], "parallelism.pp=2 x 3 stages"),
        (Mesh(pp=2, schedule="interleaved", micro_batches=5), ["workload.batch=20"], "in equal rounds"),
        (Mesh(pp=2, schedule="zbv", micro_batches=2), [], "needs 2 x pp - 1 = 3 micro-batches, there are 2"),
        (Mesh(pp=2, dp=2, zero=3), [], "until its last micro-batch, which is zero=1"),
        (Mesh(pp=2), ["accumulation=gradients"], "use parallelism.micro_batches"),
        (Mesh(pp=2), ["checkpointing=uniform", "checkpointing.every=2"], "one block a segment"),
        (Mesh(pp=2, schedule="zbv"), ["checkpointing=uniform"], "backward pass in two halves"),
        (Mesh(pp=2), ["compile=on"], "add compile.per_block=true"),
        (Mesh(pp=2, schedule="zero_bubble"), ["compile=on", "compile.per_block=true"], "backward pass in two halves"),
        (Mesh(cp=2), ["workload.seq=126"], "workload.seq=126 cannot be split into 4 parts, twice parallelism.cp=2"),
        (Mesh(cp=2), ["attention=math"], "attention=math: the ring merges the parts of cuDNN's or PyTorch's flash kernel"),
        (Mesh(cp=2), ["attention=sdpa", "attention.backend=efficient"], "with attention.backend=auto, flash or cudnn"),
        (Mesh(cp=4, context="ulysses"), [], "model.kv_heads=2 cannot be split over parallelism.cp=4"),
        (Mesh(cp=2, tp=2, context="ulysses"), [], "parallelism.cp=2 x parallelism.tp=2, which ulysses needs"),
        (Mesh(tp=2), ["loss=chunked"], "the head is split over ranks: use loss=full"),
        (Mesh(pp=2), ["loss=fused"], "one stage has the head and the logits: use loss=full"),
        (Mesh(tp=2), ["precision=fp8"], "multiplies by whole weights, which tensor ranks split"),
        (Mesh(dp=2, zero=3), ["precision=fp16"], "loss scaling looks for overflows in whole gradients"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_says_why(layout, overrides, words, tmp_path):
    on = device("cuda", 1) if "machine" in words else None
    assert words in (reason(tmp_path, layout, *overrides, on=on) or "")


@pytest.mark.parametrize(
    "layout",
    [
        Mesh(),
        Mesh(dp=8),
        Mesh(dp=4, zero=3, replicate=2),
        Mesh(dp=8, zero=3, reshard_to=4),
        Mesh(dp=2, cp=2, zero=3, reshard_to=2),
        Mesh(dp=8, zero=3, replicate=2, reshard_to=2),
        Mesh(tp=2),
        Mesh(pp=2),
        Mesh(pp=2, schedule="interleaved"),
        Mesh(pp=2, schedule="zbv"),
        Mesh(cp=2),
        Mesh(cp=2, context="ulysses"),
        Mesh(dp=2, tp=2, pp=2, zero=1),
    ],
    ids=str,
)
def test_a_layout_that_can_be_has_no_reason(layout, tmp_path):
    assert reason(tmp_path, layout) is None
    assert reason(tmp_path, layout, on=device("cuda", 8)) is None


def test_fp16_runs_replicated(tmp_path):
    assert reason(tmp_path, Mesh(dp=2), "precision=fp16") is None


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 12])
def test_stages_cover_the_layers_and_no_cut_is_cheaper(stages):
    cuts = _stages.balance(SHAPE, stages, tokens=16384)
    assert [i for cut in cuts for i in cut] == list(range(12)) and all(len(cut) for cut in cuts)
    first, block, last = _stages.costs(SHAPE, 16384)

    def worst(ends):
        starts = [0, *ends]
        return max(
            (b - a) * block + first * (a == 0) + last * (b == 12) for a, b in zip(starts, [*ends, 12], strict=True)
        )

    def every(start, left):
        if left == 0:
            yield []
        for end in range(start + 1, 12 - left + 1) if left else ():
            yield from ([end, *rest] for rest in every(end, left - 1))

    assert worst([cut.stop for cut in cuts[:-1]]) == pytest.approx(min(map(worst, every(0, stages - 1))))


def test_a_heavy_head_takes_layers_from_the_last_stage():
    vocabulary = 128256
    total = int(12 * 7.1e6 + vocabulary * 768)
    heavy = Shape(total, total, 12, 768, 3072, 12, 12, 64, vocabulary, 16, 1024)
    lengths = [len(cut) for cut in _stages.balance(heavy, 2, tokens=16384)]
    assert lengths[0] > lengths[1]


def simulated_bubble(layout):
    """Play torch's own order of actions: a forward takes 1 and a backward 2, input and weight gradients 1 each."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining.schedules import _ComputationType as Kind

    stages = layout.pp * _stages.stages_per_rank(layout)
    count = _stages.stages_per_rank(layout)
    name, many, _ = _stages.SCHEDULES[layout.schedule]
    fakes = [
        SimpleNamespace(num_stages=stages, group_size=layout.pp, group_rank=0, stage_index=i, submod=None,
                        is_first=i == 0, is_last=i == stages - 1, has_backward=True)
        for i in range(count)
    ]  # fmt: skip
    schedule = getattr(pipelining, name)(fakes if many else fakes[0], layout.micro_batches, loss_fn=lambda *_: None)
    took = {Kind.FORWARD: 1.0, Kind.FULL_BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}
    queues = {rank: [a for a in order if a is not None and a.computation_type in took]
              for rank, order in schedule.pipeline_order.items()}  # fmt: skip
    ready: dict = {}
    clock = dict.fromkeys(queues, 0.0)
    backward = (Kind.FULL_BACKWARD, Kind.BACKWARD_INPUT)
    while any(queues.values()):
        moved = False
        for rank, queue in queues.items():
            while queue:
                stage, kind, micro = queue[0].stage_index, queue[0].computation_type, queue[0].microbatch_index
                if kind == Kind.FORWARD:
                    needs = [] if stage == 0 else [("f", stage - 1, micro)]
                elif kind in backward:
                    needs = [("f", stage, micro)] if stage == stages - 1 else [("b", stage + 1, micro)]
                else:
                    needs = [("b", stage, micro)]
                if any(need not in ready for need in needs):
                    break
                clock[rank] = max([clock[rank], *(ready[need] for need in needs)]) + took[kind]
                if kind != Kind.BACKWARD_WEIGHT:
                    ready["f" if kind == Kind.FORWARD else "b", stage, micro] = clock[rank]
                queue.pop(0)
                moved = True
        assert moved, "the order of actions cannot be played"
    return 1 - 3 * count * layout.micro_batches / max(clock.values())


# Not 1f1b, which idles like gpipe: torch 2.13 lists its last rank's forward passes from the second micro-batch on.
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 16)])
def test_the_bubble_is_that_of_torchs_order_of_actions(schedule, pp, micro_batches):
    layout = Mesh(pp=pp, schedule=schedule, micro_batches=micro_batches)
    assert _stages.bubble(layout) == pytest.approx(simulated_bubble(layout), abs=0.02)


def sent(layout, micro_batches=1):
    shape = Shape(**{**vars(SHAPE), "micro_batches": micro_batches})
    said = _cost.footprint(layout, shape)
    return said.wire_bytes + 4 * (said.wire_weights + said.wire_activations)


def test_gradients_are_whole_between_the_micro_batches_of_zero1_alone():
    def gradients(zero, micro_batches, **degrees):
        shape = Shape(**{**vars(SHAPE), "micro_batches": micro_batches})
        return _cost.footprint(Mesh(**({"dp": 8} | degrees), zero=zero), shape).gradient_factor

    assert gradients(1, 1) == gradients(2, 1) == gradients(2, 4) == gradients(3, 4) < 0.25
    assert gradients(1, 4) == pytest.approx(1.0)
    assert gradients(1, 1, dp=1, tp=2) == gradients(0, 1, dp=1, tp=2)  # nobody to share them with


def test_what_is_sent_follows_the_papers():
    whole = 4 * 138e6
    assert sent(Mesh(dp=8)) == pytest.approx(2 * whole * 7 / 8)
    assert sent(Mesh(dp=8, zero=1), 4) == pytest.approx(2 * whole * 7 / 8)
    assert sent(Mesh(dp=8, zero=2), 4) == pytest.approx((1 + 4) * whole * 7 / 8)
    blocks = whole - 4 * 32000 * 768
    assert sent(Mesh(dp=8, zero=3), 4) == pytest.approx(4 * (2 * whole + blocks) * 7 / 8)
    tokens = 16 * 1024
    layers = sent(Mesh(tp=4, loss_parallel=False)) - 4 * tokens * 32000 * 3 / 4
    assert layers == pytest.approx((12 * 4 + 2) * 2 * 3 / 4 * tokens * 768 * 4)
    tie = 4 * 32000 * 768
    assert sent(Mesh(pp=4)) - tie <= 2 * tokens * 768 * 4 <= sent(Mesh(pp=4)) + tie
    key_bytes = 4 * tokens / 4 * 2 * 768
    assert sent(Mesh(cp=4, zero=0)) - 2 * whole * 3 / 4 == pytest.approx(12 * 3 * 3 * key_bytes)
    ulysses = 12 * 2 * 4 * (4 * tokens / 4 * 768) * 3 / 4
    assert sent(Mesh(cp=4, context="ulysses")) - 2 * whole * 3 / 4 == pytest.approx(ulysses)


def test_what_is_kept_falls_with_every_level_and_degree(tmp_path):
    def peak(*layout):
        big = ["model=1b", "workload.batch=8", "workload.seq=2048", "precision=bf16"]
        return predict(tiny.pipeline(tmp_path, *big, *layout).recipe, device()).peak_memory_bytes

    levels = [peak(f"parallelism={name}", "parallelism.dp=8") for name in ("ddp", "zero1", "zero2", "zero3")]
    assert levels == sorted(levels, reverse=True) and levels[3] < 0.5 * levels[0]
    for degree in ("tensor", "context", "pipeline"):
        assert peak(f"parallelism={degree}") < peak("parallelism=none")


def test_a_pipelines_plan_is_that_of_its_fullest_and_its_slowest_rank(tmp_path):
    """Schedules of one bubble take one time; what is in flight tells their memory; a pipeline shares the work out."""

    def plan(*words):
        large = ["model=160m", "workload.batch=32", "workload.seq=1024", "precision=bf16", "hardware=h100", *words]
        card = planned(options()["h100"])
        return predict(tiny.pipeline(tmp_path, *large).recipe, replace(card, count=4))

    one = plan("parallelism=none")
    piped = {s: plan("parallelism=pipeline", f"parallelism.schedule={s}") for s in ("gpipe", "1f1b", "interleaved")}
    peaks = [piped[s].peak_memory_bytes for s in ("gpipe", "interleaved", "1f1b")]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[2]
    assert piped["gpipe"].step_s == pytest.approx(piped["1f1b"].step_s)
    # The host, which launches every micro-batch, is as slow as the device here: 1.6 was measured on two H100s.
    assert 1.2 < piped["1f1b"].step_s * 2 * (1 - piped["1f1b"].bubble) / one.step_s < 1.6


def test_the_plan_says_bytes_and_bubble(tmp_path):
    recipe = tiny.pipeline(tmp_path, *SMALL, "parallelism=pipeline").recipe
    plan = predict(recipe, device()).to_json()
    assert plan["bubble"] == pytest.approx(1 / 5) and plan["wire_bytes_per_step"] > 0
    assert shape_of(recipe).micro_batches == 4


def test_a_ring_attends_by_the_kernel_that_the_recipe_names():
    for words, backend in ((["attention=sdpa"], "auto"), (["attention=sdpa_flash"], "flash"), (["attention=math"], None),
                           (["attention=sdpa_cudnn"], "cudnn"), (["attention=sdpa", "attention.backend=flash"], "flash"),
                           (["attention=sdpa_math"], None), (["attention=triton_flash"], None)):  # fmt: skip
        assert ring_backend(compose(words)) == backend, words
