"""What the kernels compile to for an H100 (sm_90), which needs no GPU: tensor-core instructions and no spills."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compiled(fn, pointers, constants, warps, stages):
    """Compile one kernel for sm_90; pointers: name -> element type. Returns its use of the machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    rates = ("lr", "beta1", "beta2", "eps", "weight_decay", "correction1", "correction2")
    kinds = dict.fromkeys(("scale_log2", *rates), "fp32")
    signature = {
        n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else kinds.get(n, "i32") for n in names
    }
    aligned = [n for n in names if n in pointers or n.startswith("stride") or n in ("inputs", "row_bytes", "outputs")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    made = triton.compile(
        ASTSource(fn, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": made.metadata.shared,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
    }


def attention(dim, queries, dtype="bfloat16", documents=False):
    import torch

    from dyno.kernels import _flash

    tiles = _flash.choose_tiles(dim, getattr(torch, dtype), queries)
    element = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    pointers = {**dict.fromkeys(("Q", "K", "V", "Out"), element), "Starts": "i32", "Lse": "fp32"}
    constants = {
        "DIM": dim, "BLOCK_D": dim, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "CAUSAL": queries > 1,
        "DOCUMENTS": documents, "UPCAST": False, "PRECISION": "ieee",
    }  # fmt: skip
    return compiled(_flash._forward, pointers, constants, tiles.warps, tiles.stages)


def linear(bits):
    import torch

    from dyno.kernels import _quantized
    from dyno.kernels.quantized_linear import quantize

    weight = quantize(torch.zeros(64, 256), bits, 128)
    tiles = _quantized.gemm_tiles(weight, torch.bfloat16)
    pointers = {"X": "bf16", "Packed": "u8", "Scales": "fp16", "Zeros": "u8", "Out": "fp32"}
    constants = {
        "BITS": bits, "BLOCK_M": 16, "BLOCK_N": tiles.outputs, "BLOCK_B": tiles.step_bytes, "UNIFORM": True,
        "SYMMETRIC": False, "UPCAST": False,
    }  # fmt: skip
    return compiled(_quantized._gemm, pointers, constants, tiles.warps, tiles.stages)


def fp8_operands(element, target):
    from dyno.kernels import _fp8_cast

    pointers = {"X": element, "RowScale": "fp32", "ColumnScale": "fp32", "Rows": target, "Columns": target}
    constants = {"ROW_STRIDE": 1, "COLUMN_STRIDE": 1, "LIMIT": 448.0, "BLOCK": _fp8_cast.TILE}
    return compiled(_fp8_cast._cast, pointers, constants, 4, 3)


def cross_entropy(element):
    from dyno.kernels import _cross_entropy

    pointers = {"Logits": element, "Targets": "i64", "Losses": "fp32"}
    constants = {"TURNS": _cross_entropy.TURNS, "LANES": _cross_entropy.MAX_BLOCK // _cross_entropy.TURNS}
    return compiled(_cross_entropy._losses_and_slopes, pointers, constants, 32, 3)


TABLES = {"Addresses": "i64", "Counts": "i64", "Owners": "i32", "Numbers": "i32"}  # of kernels over many tensors


def step_kernel(module, warps, **constants):
    import triton.language as tl

    pointers = {**TABLES, **dict.fromkeys(("Signed", "Unsigned", "Scale"), "fp32")}
    types = {"ELEMENT": tl.bfloat16, "GRADIENT": tl.bfloat16, "HAS_MASTER": True, "ALIGNMENT": 16}
    constants |= {**types, "BLOCK": module.BLOCK}
    return compiled(module._step, pointers, constants, warps, 3)


def adamw8bit():
    from dyno.kernels import _adamw8bit_step

    return step_kernel(_adamw8bit_step, 2, ROWS=_adamw8bit_step.ROWS, TURNS=_adamw8bit_step.TURNS)


def adamw():
    from dyno.kernels import _adamw_step

    return step_kernel(_adamw_step, 4)


def square_sums():
    import triton.language as tl

    from dyno.kernels import _square_sums

    constants = {"ELEMENT": tl.bfloat16, "ALIGNMENT": 16, "BLOCK": _square_sums.BLOCK, "TURNS": _square_sums.TURNS}
    return compiled(_square_sums._squares, {**TABLES, "Sums": "fp32"}, constants, 4, 3)


def test_sm90_code():
    # In a process of its own: this one may already have imported the kernels for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, use in found.items():
        assert use["stack_bytes"] == 0, (name, use)
        assert use["shared_bytes"] <= 227 * 1024, (name, use)
    assert all(found[name]["wgmma"] > 0 for name in ("prefill_d128", "prefill_d64", "documents_d128", "int4")), found


if __name__ == "__main__":
    print(json.dumps({
        "prefill_d128": attention(128, 4096),
        "prefill_d64": attention(64, 4096),
        "documents_d128": attention(128, 4096, documents=True),
        "documents_d64": attention(64, 4096, documents=True),
        "decode_d128": attention(128, 1),
        "fp32_d64": attention(64, 4096, "float32"),
        "int4": linear(4),
        "int8": linear(8),
        "adamw8bit": adamw8bit(),
        "adamw": adamw(),
        "square_sums": square_sums(),
        "cross_entropy": cross_entropy("bf16"),
        "fp8_of_bf16": fp8_operands("bf16", "fp8e5"),
        "fp8_of_fp32": fp8_operands("fp32", "fp8e4nv"),
    }))  # fmt: skip
