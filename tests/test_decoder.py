"""The decoder: counts by arithmetic, causality, grouped heads against full ones, seeded weights."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from dyno.kernels.attention import eager
from dyno.model.config import ModelConfig, parameter_counts
from dyno.model.decoder import Decoder, Embedding

VARIANTS = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "bias": {"qkv_bias": True},
    "everything": {"tied_embeddings": False, "qk_norm": True, "qkv_bias": True, "kv_heads": 1, "layers": 3},
    "wide_heads": {"head_dim": 16, "kv_heads": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_are_the_real_ones(variant):
    model = Decoder(tiny.config(**VARIANTS[variant]))
    total, linear = parameter_counts(model.config)
    assert total == sum(p.numel() for p in model.parameters())
    assert linear == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_does_not_change_the_past(variant):
    model = tiny.model(sharpness=6.0, **VARIANTS[variant])
    text = tiny.tokens(3, 12)
    changed = text.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % tiny.SIZES["vocab_size"]
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3  # every later position sees the change


def test_the_past_and_its_order_change_the_future():
    model, text = tiny.model(sharpness=6.0), tiny.tokens(2, 10)
    swapped = text.clone()
    swapped[:, [1, 3]] = text[:, [3, 1]]
    assert (model(text)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_full_heads_with_repeated_weights(kv_heads):
    grouped = tiny.model(sharpness=6.0, kv_heads=kv_heads)
    full = Decoder(tiny.config(kv_heads=4)).eval()
    state, dim = grouped.state_dict(), tiny.SIZES["head_dim"]
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = state[name].view(kv_heads, dim, -1).repeat_interleave(4 // kv_heads, 0)
            state[name] = heads.reshape(4 * dim, -1)
    full.load_state_dict(state)
    text = tiny.tokens(3, 9)
    torch.testing.assert_close(grouped(text), full(text), atol=1e-5, rtol=1e-5)


def test_attention_is_aligned_to_the_bottom_right():
    """The last queries of a longer text give the last rows of the whole attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, generator=generator) for _ in range(3))
    whole = eager(q, k, v, causal=True)
    for new in (1, 3, 8):
        torch.testing.assert_close(eager(q[:, :, -new:], k, v, causal=True), whole[:, :, -new:])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-5)


def test_initialise_is_deterministic_and_scaled_by_depth():
    first, again, other = tiny.model(3), tiny.model(3), tiny.model(4)
    torch.manual_seed(99)  # the global generator has no say
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)
    deep = tiny.model(layers=8, hidden=64, ffn_width=128)
    assert deep.blocks[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert deep.blocks[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="model.heads=4 is no multiple of model.kv_heads=3"):
        ModelConfig(**{**tiny.SIZES, "kv_heads": 3})


FEW, MANY = (2, 300), (4, 300)  # PyTorch's own gradient, which is taken for many, adds up in bf16 on a CPU


@pytest.mark.parametrize(
    "size, dtype",
    [(FEW, torch.float32), (FEW, torch.bfloat16), ((1, 1), torch.bfloat16), (MANY, torch.float32)],
    ids=str,
)
def test_a_table_s_compiled_gradient_is_the_table_s(size, dtype):
    """Tokens that repeat, ones that never come, more than the table has rows; beside a gradient as of a tied head."""
    table = Embedding(1000, 24).to(dtype)
    tokens = torch.randint(0, 40, size, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(*size, 24, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradient(call):
        table.weight.grad = None
        call(tokens).backward()
        return table.weight.grad.clone()

    def loss(tokens):
        return (table(tokens) * slope).sum() + table.weight.pow(2).sum()

    expected = gradient(lambda tokens: (F.embedding(tokens, table.weight.float()) * slope.float()).sum()).float()
    expected += 2 * table.weight.detach().float()
    got = gradient(torch.compile(loss, backend="aot_eager"))
    torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.equal(got[40:], 2 * table.weight.detach()[40:])
