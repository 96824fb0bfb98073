"""Selective checkpointing: keep what is dear to compute, recompute what is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape
from dyno.techniques.checkpointing.blocks import Recomputing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.checkpoint import CheckpointPolicy

    from dyno.measure.environment import Device

DEAR = {
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "dyno.fp8_products",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_efficient_attention",
}  # fmt: skip


HOST = 3.0  # host time of an eager step over that of one without: the policy, in Python, sees every operation (H100)


@dataclass
class Selective(Recomputing):
    """Keep the outputs of matrix products and attention in every block, recompute norms, rotations and activations.

    Paper: Korthikanti et al. 2022, arXiv:2205.05198. No product is computed twice, so it costs memory traffic only.
    """

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Kept, in numbers a token: the block's input, q, k, v, attention, its projection, gate, up and down."""
        kv = 2 * shape.kv_heads * shape.head_dim
        numbers = 3 * shape.hidden + 2 * shape.heads * shape.head_dim + kv + 2 * shape.ffn
        whole = 8.0 * shape.hidden + 2 * shape.heads * shape.head_dim + kv + 4.0 * shape.ffn  # of a block in 16 bits
        share = numbers / whole
        return Footprint(
            activation_factor=share,
            recompute_blocks=max(0.0, 1 - share),
            keeps_products=True,
            product_numbers=numbers,
            blocks_again=1.0,
            host_factor=HOST,
        )

    def apply(self, run: Run) -> None:
        assert run.model is not None
        for block in run.model.blocks:
            block.forward = MethodType(forward, block)


def forward(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """A block's forward pass that keeps what is dear.

    Inside the block, not round it, so that a compiler of blocks sees the policy and keeps it. Round compiled code it would
    see buffers that the code uses again for other values, and take them for the products.
    """
    from torch.utils.checkpoint import checkpoint

    plain = type(block).forward
    if not x.requires_grad and not block.training:
        return plain(block, x, *rest)
    # No random state is kept: nothing in a block draws a random number.
    return checkpoint(plain, block, x, *rest, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def contexts() -> tuple[Any, Any]:
    """Modes for the forward pass and for its recomputation."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(policy)


def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    from torch.utils.checkpoint import CheckpointPolicy

    dear = str(getattr(operation, "overloadpacket", None)) in DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
