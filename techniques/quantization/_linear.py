"""A linear layer that holds a packed weight, and which layers of a model it may replace."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from dyno.errors import UserError
from dyno.kernels.quantized_linear import PackedWeight, dequantize, linear

# Scales are kept as integers of the same width: `model.to(torch.bfloat16)` casts floating-point buffers, and a scale
# rounded after its codes were chosen would silently cost accuracy.
STORED = {torch.float16: torch.int16, torch.float32: torch.int32}
SCALES = {stored: scale for scale, stored in STORED.items()}


class QuantizedLinear(nn.Module):
    """y = x W' + b with W packed (see `dyno.kernels.quantized_linear`); x (..., K) -> (..., N)."""

    packed: Tensor
    scale_bits: Tensor
    zeros: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        self.bits, self.group_size, self.in_features = weight.bits, weight.group_size, weight.in_features
        self.out_features = weight.out_features
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale_bits", weight.scales.view(STORED[weight.scales.dtype]))
        self.register_buffer("zeros", weight.zeros)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def packed_weight(self) -> PackedWeight:
        scales = self.scale_bits.view(SCALES[self.scale_bits.dtype])
        return PackedWeight(self.packed, scales, self.zeros, self.bits, self.group_size, self.in_features)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that the codes stand for."""
        return dequantize(self.packed_weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed_weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


def linears(model: nn.Module, skip: list[str]) -> dict[str, nn.Linear]:
    """The linear layers of a model by name, without those that a pattern of `skip` names.

    Raises:
        UserError: a pattern that names no module, which is a misspelt one.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(f"skip pattern '{pattern}' names no module of the model; a module is called {names[-1]}")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in skip)
    }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all that a model's state dict holds, tied tensors once."""
    tensors = {(x.data_ptr(), x.shape): x for x in model.state_dict(keep_vars=True).values()}
    return sum(x.numel() * x.element_size() for x in tensors.values())
