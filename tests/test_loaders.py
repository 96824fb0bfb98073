"""Hugging Face directories: logits equal to transformers', and every wrong file refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dyno.errors import UserError
from dyno.model import loaders
from dyno.model.config import ModelConfig
from dyno.model.decoder import Decoder

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": ("Llama", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 128}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def make(family: str, **changes: Any) -> Any:
    """A tiny random transformers model whose norms and biases are random too, so that none can be forgotten."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def logits(config: ModelConfig, state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state, strict=True)
    with torch.no_grad():
        return decoder(tokens)


def agree(model: Any, config: ModelConfig, state: dict[str, torch.Tensor], length: int = 100) -> None:
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.1  # not trivially equal
    torch.testing.assert_close(logits(config, state, tokens), expected, atol=1e-4, rtol=0)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make("Llama").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    model = make(family, **changes)
    model.save_pretrained(tmp_path)
    config, state = loaders.load_directory(tmp_path)
    assert (config.qk_norm, config.qkv_bias) == (family == "Qwen3", family == "Qwen2")
    assert config.tied_embeddings == changes.get("tie_word_embeddings", False)
    assert (config.rope_scaling is not None) == (name == "llama3-rope")
    agree(model, config, state)


def test_sharded_weights_give_the_same_state(tmp_path: Path) -> None:
    model = make("Qwen2")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    agree(model, *loaders.load_directory(tmp_path))


def test_the_words_of_older_files_mean_the_same(tmp_path: Path) -> None:
    model = make("Llama", rope_parameters=LLAMA3)
    model.save_pretrained(tmp_path)
    expected, _ = loaders.load_directory(tmp_path)
    scaling = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit(tmp_path, rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling, head_dim=None)
    assert loaders.load_directory(tmp_path)[0] == expected


def test_stored_type_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    make("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {t.dtype for t in loaders.load_directory(tmp_path)[1].values()} == {torch.bfloat16}
    assert {t.dtype for t in loaders.load_directory(tmp_path, dtype=torch.float32)[1].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "'gemma' is not supported; there is Llama, Mistral, Qwen2, Qwen3, SmolLM"),
        ({"model_type": "smollm3"}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight (and 8 more)"),
        ({"num_hidden_layers": 1}, "does not explain: model.layers.1."),
        ({"model_type": "qwen2"}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"vocab_size": 98}, "model.embed_tokens.weight has shape (97, 64), it should be (98, 64)"),
        ({"vocab_size": "many"}, "vocab_size should be a positive whole number"),
        ({"num_key_value_heads": 3}, "no multiple"),
    ],
)
def test_a_model_the_decoder_is_not_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        loaders.load_directory(edit(llama, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sliding_window_only_beyond_the_tokens_in_use(tmp_path: Path) -> None:
    model = make("Mistral", sliding_window=32)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.max_seq=32 or less"):
        loaders.load_directory(tmp_path)
    config, state = loaders.load_directory(tmp_path, max_seq=32)
    assert config.max_seq == 32
    agree(model, config, state, length=32)
    with pytest.raises(UserError, match="1 to 128 tokens"):
        loaders.load_directory(tmp_path, max_seq=129)


def test_pickles_and_strange_paths_are_never_opened(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights, which can run code"):
        loaders.load_directory(llama)
    index = llama / "model.safetensors.index.json"
    for name in ("../elsewhere.safetensors", "pytorch_model.bin", "/etc/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(UserError, match="only safetensors files beside it"):
            loaders.load_directory(llama)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match="lacks the shard gone.safetensors"):
        loaders.load_directory(llama)


def test_broken_files_are_one_line(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no valid safetensors"):
        loaders.load_directory(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        loaders.load_directory(llama)
    with pytest.raises(UserError, match="no config.json"):
        loaders.load_directory(tmp_path_factory.mktemp("empty"))


def test_load_by_recipe(llama: Path, tmp_path: Path) -> None:
    model = {"source": "hf_directory", "name": "hf", "path": str(llama), "id": None, "max_seq": 64}
    first = loaders.load(model, tmp_path / "cache")
    assert first.config.max_seq == 64 and first.tokenizer is None
    assert loaders.describe(model)["layers"] == 2
    assert loaders.load(model, tmp_path / "cache").fingerprint == first.fingerprint
    (llama / "tokenizer.json").write_text("{}")
    assert loaders.load(model, tmp_path / "cache").tokenizer == llama / "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer_file=/nowhere is no file"):
        loaders.tokenizer_of({**model, "tokenizer_file": "/nowhere"})
    with pytest.raises(UserError, match="model.layers=3, but"):
        loaders.load({**model, "layers": 3}, tmp_path / "cache")
    make("Llama", num_key_value_heads=4).save_pretrained(llama)
    assert loaders.load(model, tmp_path / "cache").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"source": "hf_directory", "path": None}, "needs model.path=DIRECTORY"),
        ({"source": "hf_directory", "path": "nobody/nothing"}, "model.source=hub model.id=nobody/nothing"),
        ({"source": "gguf", "path": None}, "needs model.path=FILE.gguf"),
        ({"source": "gguf", "path": "/nowhere.gguf"}, "is no file"),
        ({"source": "hub", "id": None}, "needs model.id=OWNER/NAME"),
        ({"source": "torchhub"}, "there is hf_directory, hub, gguf, smollm2"),
    ],
)
def test_a_recipe_that_names_no_model(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        loaders.load(model)
    assert message in str(caught.value)


def test_hub_offline_and_wrong_ids_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not in the local cache"):
        loaders.load_hub("nobody/nothing")
    with pytest.raises(UserError, match="no hub id"):
        loaders.load_hub("a/b/c")
