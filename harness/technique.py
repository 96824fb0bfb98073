"""The one interface of a technique, and the run that a technique edits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyno.errors import Conflict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dyno.data import Document
    from dyno.measure.environment import Device
    from dyno.model.decoder import Decoder
    from dyno.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """The sizes a prediction needs: the model's, the workload's batch (sequences) and seq (tokens), and its splits."""

    parameters: int
    linear_parameters: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    batch: int
    seq: int
    micro_batches: int = 1
    tied: bool = True
    qk_norm: bool = False
    kept_bytes: float = 0.0  # of the blocks on a rank when nothing is recomputed; where a technique `needs_kept_bytes`

    @property
    def tensors(self) -> int:
        """How many parameters the model has as tensors."""
        return self.layers * (11 if self.qk_norm else 9) + (2 if self.tied else 3)


@dataclass(frozen=True)
class Footprint:
    """A technique's share of the prediction, on one rank. The default changes nothing; the default says how shares
    of several techniques combine (`combined`): None: the last axis's word counts; 1: they multiply; 0: they add;
    False: any of them is enough.

    Widths are bytes of one number: `weight_bytes` of a matrix weight as it is served; `parameter_bytes`, `gradient_bytes`
    and `optimizer_bytes` (all of its state) of a parameter in training, `activation_width`; `cast_bytes` of a block's
    weight as its products keep it, where not of an activation's width, and `input_bytes` of their inputs, by products that
    take layers of one input together. `matmul_dtype` names the format of the matrix products, `wide_dtype` that of head and
    attention where it is another, and `matmul_gain` how much faster the former are where no ceiling of theirs was measured.

    Factors. `parameter_factor`, `gradient_factor` and `optimizer_factor` are the share of the state that stays on the
    device; `batch_factor` the share of the step's tokens that are alive at once, in each of `micro_batches` passes;
    `layer_factor` the share of the layers (pipeline), `width_factor` of the heads and channels (tensor parallel);
    `activation_factor` the share of a block's inside that the forward pass keeps, `boundary_factor` of its input where
    that is kept instead, `stay_factor` the share of the blocks whose kept tensors are on the device at once,
    `logits_factor` the same of the logits, `head_factor` whether this rank has the head (pipeline), `in_flight` the
    micro-batches whose activations it keeps at once, `host_factor` the host's time in an eager step. `logits_rows`:
    tokens whose logits are in memory, where not all; `loss_copies` of them, in fp32, at the loss's fullest moment,
    where not 3, and `loss_passes` over them, of an activation's width, in all of the loss, where it is not PyTorch's,
    which may be `loss_in_place`: the logits become their gradient at once, and the head's waits; beside them, of other
    micro-batches, `kept_losses` log-softmaxes and `kept_outputs` logits, or their gradients, of an activation's width;
    and `earlier_gradients`, the share of the gradients that micro-batches before have left by then.

    Amounts. `master_bytes` a parameter of a wider copy; of the copies that the optimizer's step makes of weights and
    gradients `step_bytes` at once, `step_traffic` bytes a parameter and `cast_launches`, none of them where there are
    masters and a `one_pass_step`; of an optimizer that takes whole weights on every rank `gathered_step_bytes` at once and
    `gathered_traffic_bytes` in all; an optimizer's `step_flops`, in bf16, and its `step_launches` beside a fused step's;
    `boundaries`: block inputs kept instead of the blocks' insides; `standing_numbers` of a parameter's width, and
    `gathered_numbers` of an activation's, all step long beside weights and gradients; `visiting_blocks` whose weights are
    on the device, of an activation's width, as long as blocks compute; `recompute_blocks` whose inside the backward pass
    makes again and holds at once, `blocks_again`, the share of the blocks whose forward pass it runs again; `extra_bytes`;
    `host_bytes`; `host_traffic_bytes` that leave for the host and `host_weights`, numbers of an activation's width that
    come from it, in a micro-batch; `host_updates`, parameters that the host steps, while `host_return_bytes` come back, and
    `host_blocks`, whose kept tensors go there and come back; what a rank sends to others (`wire_weights` and
    `wire_activations`, numbers of a parameter's and an activation's width, and `wire_bytes`), of that what the device
    stands still for (`waited_activations`, `waited_bytes`), and of both what is sent again where all blocks run again
    (`wire_again`, `waited_again`); `merged_parts` of a sequence that a ring attends to one by one; `host_s`, seconds of the
    host in an eager step beside its kernels' launches, `host_again_s` of them in a forward pass, which recomputation
    repeats, and `host_compiled_s` and `host_compiled_again_s`, what a compiler leaves of both; and `bubble`, the idle share
    of a step.

    Habits. `keeps_products`: what recomputes keeps every product's output. `waits_for_step`: the host launches nothing
    until the optimizer's step is over. `fused`: a compiler fuses elementwise chains,
    `fused_loss` those of the loss too. Of attention: `attention_matrix` lies in memory, in fp32; `score_copy` a second time
    in the products' type; `expanded_heads`: each query head has its own copy of its KV head; `wide_groups_unfused`: grouped
    heads in fp32 fall back to the matrix; `attention_rate` of a fused forward pass, as a share of the matrix products'.
    `document_mask`: rows hold documents that see nothing of each other, by a mask of (s, s) in memory unless the attention
    `skips_documents`; then only `document_share` of a row's keys are looked at. `graphed_decode`: the kernels of a decode
    pass are recorded once and launched as one, and its attention looks at all of the allocated cache.
    """

    weight_bytes: float | None = None
    parameter_bytes: float | None = None
    gradient_bytes: float | None = None
    optimizer_bytes: float | None = None
    activation_width: float | None = None
    cast_bytes: float | None = None
    input_bytes: float | None = None
    matmul_dtype: str | None = None
    wide_dtype: str | None = None
    matmul_gain: float | None = None
    attention_rate: float | None = None
    logits_rows: float | None = None
    loss_copies: float | None = None
    loss_passes: float | None = None
    linear_factor: float = 1.0
    parameter_factor: float = 1.0
    gradient_factor: float = 1.0
    optimizer_factor: float = 1.0
    batch_factor: float = 1.0
    layer_factor: float = 1.0
    width_factor: float = 1.0
    activation_factor: float = 1.0
    boundary_factor: float = 1.0
    stay_factor: float = 1.0
    logits_factor: float = 1.0
    head_factor: float = 1.0
    earlier_gradients: float = 1.0
    in_flight: float = 1.0
    flops_factor: float = 1.0
    host_factor: float = 1.0
    kv_cache_factor: float = 1.0
    document_share: float = 1.0
    micro_batches: float = 1.0
    attention_matrix: bool = False
    score_copy: bool = False
    expanded_heads: bool = False
    wide_groups_unfused: bool = False
    document_mask: bool = False
    skips_documents: bool = False
    graphed_decode: bool = False
    keeps_products: bool = False
    fused: bool = False
    fused_loss: bool = False
    loss_in_place: bool = False
    one_pass_step: bool = False
    waits_for_step: bool = False
    kept_losses: float = 0.0
    kept_outputs: float = 0.0
    master_bytes: float = 0.0
    step_bytes: float = 0.0
    step_traffic: float = 0.0
    gathered_step_bytes: float = 0.0
    gathered_traffic_bytes: float = 0.0
    step_flops: float = 0.0
    step_launches: float = 0.0
    cast_launches: float = 0.0
    standing_numbers: float = 0.0
    gathered_numbers: float = 0.0
    visiting_blocks: float = 0.0
    boundaries: float = 0.0
    recompute_blocks: float = 0.0
    blocks_again: float = 0.0
    extra_bytes: float = 0.0
    host_bytes: float = 0.0
    host_traffic_bytes: float = 0.0
    host_weights: float = 0.0
    host_return_bytes: float = 0.0
    host_updates: float = 0.0
    host_blocks: float = 0.0
    wire_weights: float = 0.0
    wire_activations: float = 0.0
    wire_again: float = 0.0
    wire_bytes: float = 0.0
    waited_activations: float = 0.0
    waited_again: float = 0.0
    waited_bytes: float = 0.0
    merged_parts: float = 0.0
    host_s: float = 0.0
    host_again_s: float = 0.0
    host_compiled_s: float = 0.0
    host_compiled_again_s: float = 0.0
    bubble: float = 0.0
    ranks: int = 1

    @property
    def loss_made_again(self) -> bool:
        """Whether logits come in chunks that the backward pass makes anew."""
        return self.logits_rows is not None and not self.loss_in_place

    @property
    def steps_narrow(self) -> bool:
        """Whether the optimizer reads 16-bit weights and gradients as they are, and widens no copy of them."""
        return self.one_pass_step and self.master_bytes > 0


def combined(prints: Iterable[Footprint]) -> Footprint:
    """All techniques' shares as one, each field by the rule that its default states."""
    values: dict[str, Any] = {f.name: f.default for f in fields(Footprint)}
    for footprint in prints:
        for f in fields(Footprint):
            value = getattr(footprint, f.name)
            if value == f.default:
                continue
            if f.default is None or f.default is False:
                values[f.name] = value
            elif f.default:
                values[f.name] *= value
            else:
                values[f.name] += value
    return Footprint(**values)


def of_ranks(techniques: Sequence[Technique], shape: Shape, device: Device) -> list[Footprint]:
    """All techniques' shares as one, for each rank that differs from the others."""
    return [combined(one) for one in itertools.product(*(t.footprints(shape, device) for t in techniques))]


@dataclass
class Technique:
    """One option of an axis: a dataclass of knobs with at most three methods."""

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        """The reason why this technique cannot run in this recipe on this device, in the user's words; or None."""
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """What it changes of the predicted bytes and FLOPs."""
        return Footprint()

    def footprints(self, shape: Shape, device: Device) -> list[Footprint]:
        """Those of the ranks that differ, of which `footprint` is one: the plan takes the fullest and the slowest."""
        return [self.footprint(shape, device)]

    def apply(self, run: Run) -> None:
        """Edit the run: its documents, model, or parts."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def world_size(self) -> int:
        """Ranks that the run needs: the knob `ranks` where a technique has one."""
        return int(getattr(self, "ranks", 1))

    @property
    def data_ranks(self) -> int:
        """Ranks that share the rows of a batch: all of them unless the technique says else."""
        return self.world_size

    @property
    def splits(self) -> int:
        """Micro-batches that a rank's rows are cut into: the knob `micro_batches` where a technique has one."""
        return int(getattr(self, "micro_batches", 1))

    @property
    def needs_kept_bytes(self) -> bool:
        """Whether its footprint depends on what the other techniques make the blocks keep: `Shape.kept_bytes`."""
        return False

    def decides(self, shape: Shape, device: Device) -> str | None:
        """What it would choose by itself, in one line of a plan; None where everything was chosen for it."""
        return None

    @property
    def subrecipe(self) -> list[str] | None:
        """Overrides of another recipe that is built first: the knob `teacher` or `draft` where a technique has one."""
        return getattr(self, "teacher", None) or getattr(self, "draft", None)

    @property
    def idle_knobs(self) -> frozenset[str]:
        """Knobs that mean nothing as the others are set: the name of a run in a report leaves them out."""
        return frozenset()

    @property
    def weights_on_host(self) -> bool:
        """Whether training builds the model in host memory, from where the technique places it itself."""
        return False

    @property
    def without_masters(self) -> bool:
        """Whether training keeps no weight wider than 16 bits, and rounds updated ones by a rule of its own."""
        return False

    def knobs(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class Baseline(Technique):
    """The plain option of an axis: changes nothing."""


@dataclass
class Run:
    """One stage of one run, as its techniques see it.

    Parts are named callables and values that a stage is made of. `replace` takes a part over, and a second owner is a
    typed conflict that names both; `wrap` adds a layer round whatever is there, in axis order. A run is a process, so
    nothing needs undoing.
    """

    recipe: Recipe
    stage: str
    device: torch.device
    directory: Path
    rank: int = 0
    ranks: int = 1
    documents: list[Document] = field(default_factory=list)
    model: Decoder | None = None
    teacher: Decoder | None = None
    draft: Decoder | None = None
    stream: np.ndarray | None = None
    build_model: Callable[[list[str]], Decoder] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)

    def part(self, name: str) -> Any:
        """The current value of a part; a KeyError is a programming mistake."""
        return self.parts[name]

    def replace(self, name: str, value: Any, *, by: Technique) -> None:
        """Take a part over. Raises Conflict when another technique owns it."""
        owner = self._owners.get(name)
        if owner is not None:
            raise Conflict(f"{by.name} and {owner} both replace '{name}': choose one of them")
        self._owners[name] = by.name
        self.parts[name] = value

    def wrap(self, name: str, wrapper: Callable[[Any], Any], *, by: Technique) -> None:
        """Put a layer round a part: part = wrapper(part)."""
        self.parts[name] = wrapper(self.parts[name])

    def product_dtype(self) -> torch.dtype:
        """The type that matrix products take weights in: autocast's, or else the weights' own."""
        import torch

        kind = self.device.type
        with self.part("autocast")():
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.part("weights_dtype")

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value for the record's details."""
        self.details[key] = value
