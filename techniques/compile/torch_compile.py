"""Graph compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyno.technique import Footprint, Run, Shape, Technique

if TYPE_CHECKING:
    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHED = ("reduce-overhead", "max-autotune")


@dataclass
class TorchCompile(Technique):
    """TorchDynamo captures the model, Inductor fuses and generates kernels; the first steps pay for it.

    Paper: Ansel et al. 2024, PyTorch 2, doi:10.1145/3620665.3640366. `per_block` compiles one block and reuses it.
    """

    per_block: bool = False
    mode: str = "default"

    @property
    def records_graphs(self) -> bool:
        """Whether compiled code replays CUDA graphs of its own."""
        return self.mode in GRAPHED

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        import shutil

        if self.mode not in MODES:
            return f"compile.mode is {self.mode}; it takes {', '.join(MODES)}"
        if device.kind == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return "torch.compile on a CPU needs a C++ compiler (g++ or clang++) on the path"
        if recipe.config["workload"]["measures"] == "infer":
            decode = recipe.option("decoding")
            if recipe.option("kv_cache") == "none":
                return f"compile with kv_cache=none would recompile at every length of {decode} decoding"
        return None

    def footprint(self, shape: Shape, device: Device) -> Footprint:
        """Fused elementwise chains keep fewer intermediates."""
        return Footprint(fused=True, fused_loss=not self.per_block)

    def apply(self, run: Run) -> None:
        import torch

        assert run.model is not None
        mode = None if self.mode == "default" else self.mode
        if self.per_block or run.stage == "infer":
            # Dynamo would cut a block that DDP holds at the bounds of DDP's buckets, a large one into some ten graphs.
            torch._dynamo.config.optimize_ddp = False
            for block in run.model.blocks:
                block.compile(mode=mode, dynamic=run.stage == "infer" or None)
            return
        # The loss is compiled with the model in it: the softmax over the vocabulary fuses, evaluation stays eager.
        run.wrap("loss", lambda loss: torch.compile(loss, mode=mode), by=self)
