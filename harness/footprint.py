"""What a technique changes of a prediction, in numbers, and the sizes that it is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any


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
    def block_parameters(self) -> int:
        """Those of the matrices of all blocks."""
        return self.linear_parameters - self.vocab * self.hidden

    @property
    def block_tensors(self) -> int:
        """How many parameters one block has as tensors."""
        return 11 if self.qk_norm else 9

    @property
    def tensors(self) -> int:
        """How many the model has."""
        return self.layers * self.block_tensors + (2 if self.tied else 3)


@dataclass(frozen=True)
class Footprint:
    """A technique's share of the prediction, on one rank; the default of each field changes nothing.

    The default also says how shares of several techniques combine (`combined`). None: the last axis's word counts. 1: they
    multiply. 0: they add. False: any of them is enough. "Of an activation's width" means that a number has as many bytes as
    `activation_width` says.
    """

    # Bytes of one number, and formats
    weight_bytes: float | None = None  # of a matrix weight as it is served
    parameter_bytes: float | None = None  # of a parameter in training
    gradient_bytes: float | None = None
    optimizer_bytes: float | None = None  # all of its state
    master_bytes: float = 0.0  # of a wider copy of the parameter
    activation_width: float | None = None
    cast_bytes: float | None = None  # of a block's weight as its products keep it, where not of an activation's width
    joined_share: float = 0.0  # of a block's weights, put beside each other for one product
    input_bytes: float | None = None  # of their inputs, by products that take layers of one input together
    matmul_dtype: str | None = None  # of the matrix products
    wide_dtype: str | None = None  # of head and attention, where it is another
    # How much faster than those of `wide_dtype` the others are, where no ceiling of theirs was measured.
    matmul_gain: float | None = None

    # Shares of the model and of the batch
    linear_factor: float = 1.0  # of the weights of the blocks that are served
    parameter_factor: float = 1.0  # of the parameters that stay on the device; gradients and state alike
    gradient_factor: float = 1.0
    optimizer_factor: float = 1.0
    layer_factor: float = 1.0  # of the layers (pipeline)
    width_factor: float = 1.0  # of heads and channels (tensor parallel)
    head_factor: float = 1.0  # 0 where the rank has no head (pipeline)
    batch_factor: float = 1.0  # of the step's tokens that are alive at once, in each of the micro-batches
    micro_batches: float = 1.0
    in_flight: float = 1.0  # micro-batches whose activations are kept at once
    ranks: int = 1
    context_ranks: int = 1

    # What a forward pass leaves for the backward pass
    activation_factor: float = 1.0  # share of a block's inside that is kept
    boundaries: float = 0.0  # block inputs that are kept instead
    boundary_factor: float = 1.0  # share of such an input
    stay_factor: float = 1.0  # share of the blocks whose kept tensors are on the device at once
    recompute_blocks: float = 0.0  # whose inside the backward pass makes again and holds at once
    blocks_again: float = 0.0  # share of the blocks whose forward pass runs again
    keeps_products: bool = False  # what runs again has kept every product's output
    product_numbers: float = 0.0  # a token of a block, that these and its input are
    flops_factor: float = 1.0  # FLOPs of a step over those of one without
    earlier_gradients: float = 1.0  # share of the gradients that micro-batches before have left by then
    fused: bool = False  # a compiler fuses elementwise chains
    extra_bytes: float = 0.0

    # Attention
    attention_matrix: bool = False  # scores lie in memory, in fp32
    score_copy: bool = False  # and a second time in the products' type
    expanded_heads: bool = False  # each query head has its own copy of its KV head
    wide_groups_unfused: bool = False  # grouped heads in fp32 fall back to the matrix
    attention_rate: float | None = None  # of a fused forward pass, as a share of the matrix products'
    document_mask: bool = False  # rows hold documents that see nothing of each other, by a mask of (s, s) in memory
    skips_documents: bool = False  # or without one
    document_share: float = 1.0  # of a row's keys that are looked at then
    merged_parts: float = 0.0  # of a sequence, that a ring attends to one by one

    # Head and loss
    logits_factor: float = 1.0  # share of the logits that are in memory at once
    logits_rows: float | None = None  # tokens whose logits are in memory, where not all
    loss_copies: float | None = None  # of them, in fp32, at the loss's fullest moment, where not 3
    loss_passes: float | None = None  # over them, of an activation's width, in all of a loss that is not PyTorch's
    loss_in_place: bool = False  # the logits become their gradient at once, and the head's waits
    fused_loss: bool = False  # a compiler fuses the loss's chains too
    kept_losses: float = 0.0  # log-softmaxes of other micro-batches
    kept_outputs: float = 0.0  # logits of other micro-batches, or their gradients, of an activation's width

    # The optimizer's step
    one_pass_step: bool = False  # where there are masters, nothing is widened: the next three count nothing then
    step_bytes: float = 0.0  # of wide copies of weights and gradients at once
    step_traffic: float = 0.0  # bytes a parameter through memory for them
    cast_launches: float = 0.0  # of kernels for them
    gathered_step_bytes: float = 0.0  # of whole weights on every rank at once
    gathered_traffic_bytes: float = 0.0  # through memory for those
    step_flops: float = 0.0  # in bf16, on a GPU
    step_launches: float = 0.0  # of kernels, or parameters that Python sees to for as long, beside a fused step's
    waits_for_step: bool = False  # the host launches nothing until the step is over

    # Weights that come, go or stand beside the others
    standing_numbers: float = 0.0  # of a parameter's width, all step long
    gathered_numbers: float = 0.0  # of an activation's width, all step long
    visiting_blocks: float = 0.0  # whose weights are on the device, of an activation's width, while blocks compute

    # Offload
    host_bytes: float = 0.0  # of state in host memory
    host_traffic_bytes: float = 0.0  # that leave for the host in a micro-batch
    host_weights: float = 0.0  # numbers of an activation's width that come from it in a micro-batch
    host_updates: float = 0.0  # parameters that the host steps
    host_return_bytes: float = 0.0  # that come back meanwhile
    host_blocks: float = 0.0  # whose kept tensors go to the host and come back

    # What a rank sends to others in a step; of that what the device stands still for, and what is sent again where all blocks
    # run again
    wire_weights: float = 0.0  # numbers of a parameter's width
    wire_activations: float = 0.0  # numbers of an activation's width
    wire_bytes: float = 0.0
    wire_again: float = 0.0
    waited_activations: float = 0.0
    waited_bytes: float = 0.0
    waited_again: float = 0.0
    bubble: float = 0.0  # idle share of a step (pipeline)

    # The host's time
    host_factor: float = 1.0  # of an eager step's launches
    host_s: float = 0.0  # of an eager step, beside its launches
    host_again_s: float = 0.0  # of that in a forward pass, which recomputation repeats
    host_compiled_s: float = 0.0  # what a compiler leaves of both
    host_compiled_again_s: float = 0.0

    # Serving
    kv_cache_factor: float = 1.0
    graphed_decode: bool = False  # a decode pass is launched as one, and looks at all of the allocated cache

    @property
    def tensor_ranks(self) -> int:
        return round(1 / self.width_factor)

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
