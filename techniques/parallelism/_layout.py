"""Put a layout onto a run, in the one order that composes: pipeline stages, matrices, data, then sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dyno.plan import shape_from
from dyno.technique import Run
from dyno.techniques.parallelism import _context, _pipeline, _sharding, _stages, _tensor
from dyno.techniques.parallelism._grid import Grid, state_dict

if TYPE_CHECKING:
    from dyno.techniques.parallelism.mesh import Mesh


def apply(layout: Mesh, run: Run) -> None:
    """Split the run's model and replace the parts of its step. Checkpointing and compilation come after: they wrap
    blocks from inside and outside of what is done here."""
    model = run.model
    assert model is not None
    grid = Grid(layout, run.device, run.rank)
    run.replace("data_ranks", layout.dp, by=layout)
    run.replace("groups", grid.groups(), by=layout)

    def rows(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mine = slice(grid.dp_rank, None, layout.dp)
        return tokens[mine], targets[mine]

    run.replace("local_batch", rows, by=layout)
    roots: list = [model]
    if layout.pp > 1:
        shape = shape_from(model.config, run.recipe.config["workload"])
        tokens = shape.batch * shape.seq / (layout.dp * layout.cp)
        cuts = _stages.balance(shape, layout.pp * _stages.stages_per_rank(layout), tokens)
        run.note("pipeline_stages_blocks", [[cut.start, cut.stop] for cut in cuts])
        pipeline = _pipeline.Pipeline(grid, run, cuts)
        roots = list(pipeline.stages.values())
        run.replace("micro_batches", layout.micro_batches, by=layout)
        run.replace("forward", pipeline.logits, by=layout)
        run.replace("gradients", pipeline.gradients, by=layout)
        run.replace("clip", _pipeline.clip(grid, run), by=layout)
    if layout.tp > 1:
        _tensor.split(grid, run)
    if layout.dp * layout.cp > 1 and layout.in_buckets:
        _sharding.replicate(grid, run)
    elif layout.dp * layout.cp > 1:
        _sharding.shard(grid, run, roots)
    if layout.cp > 1:
        _context.split(grid, run)
    first = grid.dp_rank == grid.cp_rank == grid.tp_rank == 0
    run.replace("writes", grid.pp_rank if first else None, by=layout)
    run.replace("whole_name", grid.whole_name, by=layout)
    run.replace("state_dict", lambda: state_dict(model, grid), by=layout)
