"""Selective checkpointing: keep what is dear to compute, recompute what is cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dyno.technique import Footprint, Run, Shape
from dyno.techniques.checkpointing.blocks import Recomputing

if TYPE_CHECKING:
    from dyno.measure.environment import Device

DEAR = {
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "dyno.fp8_products",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_efficient_attention",
}  # fmt: skip


HOST = (
    3.0  # host time of an eager step over that of one without: a policy in Python sees every operation (H100 records)
)


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
        return Footprint(activation_factor=share, recompute_blocks=max(0.0, 1 - share), host_factor=HOST)

    def apply(self, run: Run) -> None:
        from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

        model = run.model
        assert model is not None

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            dear = str(getattr(operation, "overloadpacket", None)) in DEAR
            return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)

        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def call_block(block: Any, x: Any, *rest: Any) -> Any:
                if not x.requires_grad and not model.training:
                    return call(block, x, *rest)
                return checkpoint(
                    call, block, x, *rest, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
                )

            return call_block

        run.wrap("call_block", wrapper, by=self)
