"""What binds a plan and what would change it, in one sentence each."""

from __future__ import annotations

FOR_MEMORY = {
    "logits": "a loss that does not hold all logits, or smaller micro-batches (accumulation)",
    "activations": "checkpointing, or smaller micro-batches (accumulation)",
    "recomputed inside": "shorter checkpointed segments, or smaller micro-batches (accumulation)",
    "mask": "an attention kernel that takes documents without a mask, or smaller micro-batches (accumulation)",
    "temporaries": "a fused attention kernel, or smaller micro-batches (accumulation)",
    "cast weights": "weights held in 16 bits (precision)",
    "visiting weights": "smaller blocks: whole ones come from other ranks, or from the host, while they compute",
    "optimizer": "sharding it over ranks (parallelism), a smaller state (optimizer) or offload",
    "master": "sharding it over ranks (parallelism) or offload",
    "gradients": "sharding them over ranks (parallelism), 16-bit gradients (precision) or offload",
    "weights": "sharding them over ranks (parallelism), lower precision, or fewer parameters",
    "standing buffers": "a split that leaves fewer whole weights and gradients standing on every rank (parallelism)",
    "unmodified model": "fewer evaluation tokens change nothing: the model beside it must fit too",
    "kv cache": "fewer or shorter requests, fewer KV heads, or a narrower cache",
    "extra": "fewer buffers of the chosen techniques",
}
WHILE_SERVING = {  # by phase, where nothing is trained
    ("quality", "logits"): "so many tokens are assumed at once; a run with workload.eval_tokens=0 evaluates none",
    ("decode", "logits"): "fewer requests at once",
}
FOR_TIME = {
    "products": "lower precision, or less recomputation",
    "head": "a smaller vocabulary, or lower precision",
    "attention": "a faster attention kernel, or shorter sequences",
    "scores": "a fused attention kernel: the score matrix goes through memory",
    "elementwise": "compile: passes over memory that fuse",
    "loss": "a fused loss, or compile",
    "weights": "fewer micro-batches, or weights held in 16 bits: they are cast in each",
    "optimizer": "larger batches: the optimizer's step costs the same for any",
    "host": "larger micro-batches or compile: the host launches small kernels more slowly than the device ends them",
    "fixed": "larger batches",
    "host update": "offload=none with a smaller state (optimizer), or larger batches: the host steps once for any",
    "wire": "more compute a rank, or a layout that sends less",
    "waited": "fewer tensor or context ranks: nothing hides what these send",
    "offload": "larger batches, or less on the host",
    "pipeline bubble": "more micro-batches, fewer stages, or a schedule that idles less (parallelism.schedule)",
}


def memory_advice(phase: str, terms: dict[str, float]) -> str:
    """The largest term of the binding phase and what would shrink it."""
    name = max(terms, key=lambda term: terms[term])
    remedy = WHILE_SERVING.get((phase, name)) or FOR_MEMORY[name]
    return f"{terms[name] / sum(terms.values()):.0%} of it is {name}: {remedy}"


def time_advice(terms: dict[str, float], device: tuple[str, ...], bubble_s: float, step_s: float) -> str:
    """What the step waits for longest, device, host, link or the host's optimizer, on the device its largest term, or the
    bubble that is larger; its share of the step, and what would shrink it."""
    after = "host update"  # begins when all else is over
    busy = sum(terms[name] for name in device)
    name = max(("host", "offload", "wire", "waited"), key=lambda term: terms[term])
    longest = max(busy, terms[name])
    if terms[after] > longest:
        name = after
    elif busy == longest:
        name = max(device, key=lambda term: terms[term])
    largest = terms[name]
    if bubble_s > largest:
        name, largest = "pipeline bubble", bubble_s
    return f"{largest / step_s:.0%} of it is {name}: {FOR_TIME[name]}"
