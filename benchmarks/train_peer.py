"""transformers' Llama with torch.compile, the training peer of model=1b: tokens/s at the same batch, on this GPU.

    python benchmarks/train_peer.py --batch 8 --seq 2048 --steps 30

Two variants: bf16 autocast over fp32 weights (what precision=bf16 is here) and pure bf16 weights. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def measure(pure: bool, batch: int, seq: int, steps: int) -> dict[str, float | int | str]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16 if pure else torch.float32)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, 257, (batch, seq), device="cuda")
        context = contextlib.nullcontext() if pure else torch.autocast("cuda", dtype=torch.bfloat16)
        with context:
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    return {
        "variant": "pure bf16" if pure else "bf16 autocast",
        "tokens_per_s": batch * seq / median,
        "step_time_s": median,
        "steps": steps,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pure", action="store_true", help="pure bf16 weights instead of autocast")
    given = parser.parse_args()
    row = measure(given.pure, given.batch, given.seq, given.steps)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **row}))


if __name__ == "__main__":
    main()
