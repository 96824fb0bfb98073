"""Round-to-nearest, magnitude and channel pruning on a small decoder: real sizes, kept zeros, a chain of both."""

from pathlib import Path

import pytest
import torch
import yaml

from dyno.composition import CONF
from dyno.errors import UserError
from dyno.model.config import ModelConfig
from dyno.model.decoder import Decoder
from dyno.recipe import make
from dyno.technique import Run, Shape
from dyno.techniques.quantization._linear import QuantizedLinear, linears, stored_bytes

SIZES = {"vocab_size": 97, "layers": 2, "hidden": 72, "ffn_width": 200, "heads": 9, "kv_heads": 3, "head_dim": 8}


def model(**sizes):
    made = Decoder(ModelConfig(**{**SIZES, **sizes})).initialise(0)
    return made.eval()


def build(axis, option, **knobs):
    return make({**yaml.safe_load((CONF / axis / f"{option}.yaml").read_text()), **knobs}, [])


def compressed(decoder, *techniques):
    run = Run(recipe=None, stage="compress", device=torch.device("cpu"), directory=Path("."), model=decoder)
    for technique in techniques:
        assert technique.unsupported(None, None) is None
        technique.apply(run)
    return run


def logits(decoder):
    tokens = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return decoder(tokens)


@pytest.mark.parametrize("option,close", [("int8", 0.01), ("int4", 0.15)])
def test_quantized_model_computes_with_its_packed_weights(option, close):
    decoder = model()
    before = logits(decoder)
    run = compressed(decoder, build("quantization", option))
    packed = [m for m in decoder.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == 14 and not linears(decoder, ["lm_head"])
    assert decoder.lm_head.weight is decoder.embed.weight
    assert (logits(decoder) - before).norm() < close * before.norm()
    assert run.details["model_bytes"] == stored_bytes(decoder)
    assert run.details["model_bytes"] < 0.5 * sum(4 * p.numel() for p in model().parameters())


def test_bits_per_weight_are_over_the_whole_model():
    decoder = model(tied_embeddings=False)
    dense = sum(p.numel() for p in decoder.parameters())
    run = compressed(decoder, build("quantization", "int8"))
    inside = sum(m.packed_weight.bytes for m in decoder.modules() if isinstance(m, QuantizedLinear))
    outside = 4 * (2 * 97 * 72 + 5 * 72)
    assert run.details["bits_per_weight"] == pytest.approx(8 * (inside + outside) / dense)


def test_a_change_of_type_leaves_the_scales_alone():
    decoder = model()
    compressed(decoder, build("quantization", "int4"))
    layer = decoder.blocks[0].mlp.down_proj
    before = layer.dequantized()
    decoder.to(torch.bfloat16)
    assert torch.equal(layer.dequantized(), before)
    assert logits(decoder).dtype == torch.bfloat16


def test_a_compiler_can_trace_packed_layers():
    decoder = model()
    compressed(decoder, build("quantization", "int4"))
    layer = decoder.blocks[0].mlp.down_proj
    x = torch.randn(3, 200)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_quantised_head_is_untied():
    decoder = model()
    embedding = decoder.embed.weight.clone()
    compressed(decoder, build("quantization", "int8", skip=[]))
    assert isinstance(decoder.lm_head, QuantizedLinear) and not decoder.config.tied_embeddings
    assert torch.equal(decoder.embed.weight, embedding)


def test_misspelt_skip_is_told():
    with pytest.raises(UserError, match="lm_haed"):
        compressed(model(), build("quantization", "int4", skip=["lm_haed"]))


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_magnitude_prunes_exactly(scope):
    decoder = model()
    decoder.blocks[0].mlp.up_proj.weight.data.fill_(0.5)  # all tied
    original = {name: layer.weight.clone() for name, layer in linears(decoder, ["lm_head"]).items()}
    run = compressed(decoder, build("pruning", "magnitude", sparsity=0.3, scope=scope))
    layers = linears(decoder, ["lm_head"])
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
    total = sum(w.numel() for w in original.values())
    if scope == "matrix":
        assert all(zeros[name] == round(0.3 * w.numel()) for name, w in original.items())
    else:
        assert sum(zeros.values()) == round(0.3 * total) and zeros["blocks.0.mlp.up_proj"] == 0
    for name, layer in layers.items():
        gone = layer.weight == 0
        assert torch.equal(layer.weight[~gone], original[name][~gone])
        if scope == "matrix":
            assert original[name][gone].abs().max() <= original[name][~gone].abs().min()
    assert run.details["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert not (decoder.embed.weight == 0).any()


def test_pruned_weights_stay_zero_in_training():
    decoder = model()
    compressed(decoder, build("pruning", "magnitude"))
    weight = decoder.blocks[1].attention.q_proj.weight
    gone = weight.detach() == 0
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.1)
    for _ in range(2):
        decoder(torch.randint(0, 97, (2, 9))).square().mean().backward()
        optimizer.step()
    assert (weight[gone] == 0).all() and (weight[~gone] != 0).any()


def test_channels_are_really_removed():
    decoder = model()
    for block in decoder.blocks:  # silent channels: removing them must change nothing
        block.mlp.down_proj.weight.data[:, 3::4] = 0
    before = logits(decoder)
    run = compressed(decoder, build("pruning", "ffn_channels", multiple=1))
    torch.testing.assert_close(logits(decoder), before)
    assert decoder.blocks[0].mlp.gate_proj.weight.shape == (150, 72) and decoder.config.ffn_width == 150
    assert decoder.blocks[1].mlp.down_proj.weight.shape == (72, 150)
    assert run.details["parameters"] == sum(p.numel() for p in decoder.parameters())
    removed = run.details["parameters_before_pruning"] - run.details["parameters"]
    assert removed == 2 * 3 * 72 * 50


@pytest.mark.parametrize("option", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruning_then_quantization_keeps_zeros(option, symmetric):
    decoder = model()
    prune = build("pruning", "magnitude", sparsity=0.6)
    compressed(decoder, prune)
    zeros = {name: layer.weight == 0 for name, layer in linears(decoder, ["lm_head"]).items()}
    compressed(decoder, build("quantization", option, symmetric=symmetric))
    for name, gone in zeros.items():
        assert (decoder.get_submodule(name).dequantized()[gone] == 0).all()


def test_channels_then_quantization():
    decoder = model()
    before = logits(decoder)
    run = compressed(decoder, build("pruning", "ffn_channels", ratio=0.05), build("quantization", "int8"))
    assert decoder.blocks[0].mlp.down_proj.in_features == 192
    assert (logits(decoder) - before).norm() < 0.5 * before.norm()
    assert {"parameters", "bits_per_weight", "pruning", "quantization"} <= run.details.keys()


def test_footprints_follow_the_sizes():
    shape = Shape(10_000, 8_000, 2, 20, 50, 4, 2, 5, 10, 1, 8)
    assert (
        build("pruning", "ffn_channels", multiple=1).footprint(shape, None).linear_factor == 1 - 3 * 20 * 12 * 2 / 8000
    )
    cpu = type("Device", (), {"kind": "cpu"})
    assert build("quantization", "int4", skip=[]).footprint(shape, cpu).weight_bytes == pytest.approx(0.5 + 3 / 128)


@pytest.mark.parametrize("axis,option,knobs,words", [
    ("quantization", "int4", {"bits": 3}, "4 or 8"),
    ("pruning", "magnitude", {"sparsity": 1.0}, "share"),
    ("pruning", "magnitude", {"scope": "row"}, "matrix or global"),
    ("pruning", "ffn_channels", {"ratio": -0.1}, "share"),
])  # fmt: skip
def test_wrong_knobs_have_a_reason(axis, option, knobs, words):
    assert words in build(axis, option, **knobs).unsupported(None, None)
