"""Tiny Llamas of the golden files, written in the two formats that models come in."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parents[2] / "goldens"
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def read_golden(name: str) -> dict:
    """``config`` as a dict, ``weights`` by Hugging Face name, and the other arrays of make_llama.py."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return split_golden(dict(file))


def split_golden(arrays: dict[str, np.ndarray]) -> dict:
    config = json.loads(arrays.pop("config").tobytes())
    weights = {name: arrays.pop(name) for name in list(arrays) if name.endswith(".weight")}
    return {"config": config, "weights": weights, **arrays}


@pytest.fixture(params=["llama_tied", "llama_scaled"])
def golden(request) -> dict:
    return read_golden(request.param)


@pytest.fixture
def tied() -> dict:
    return read_golden("llama_tied")


@pytest.fixture(params=["llama_tied", "llama_scaled"])
def live_golden(request) -> dict:
    """A golden of another seed, made now by the installed transformers; skips without it."""
    pytest.importorskip("torch", reason="the parity extra is not installed")
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    spec = importlib.util.spec_from_file_location("make_llama", GOLDENS / "make_llama.py")
    make_llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_llama)
    return split_golden(make_llama.golden(make_llama.CASES[request.param], seed=1))


@pytest.fixture
def write_huggingface(tmp_path) -> Callable[..., Path]:
    """A function that writes config.json and model.safetensors into a folder."""

    def write(config: dict, weights: dict[str, np.ndarray]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.fixture
def write_gguf(tmp_path) -> Callable[..., Path]:
    """A function that writes a GGUF file as llama.cpp's converter does: the rows of q and k permuted."""

    def write(config: dict, weights: dict[str, np.ndarray], architecture: str = "llama", **extra) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads["q_proj"])
        writer.add_head_count_kv(heads["k_proj"])
        writer.add_key_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_token_list([str(i) for i in range(config["vocab_size"])])
        for name, weight in weights.items():
            n = heads.get(name.split(".")[-2])
            if n is not None:
                paired = weight.reshape(n, 2, config["head_dim"] // 2, -1).swapaxes(1, 2)
                weight = paired.reshape(weight.shape)
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
        for name, tensor in extra.items():
            writer.add_tensor(f"{name}.weight", tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] != ["model", "layers"]:
        return GGUF_NAMES[".".join(parts)] + ".weight"
    return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.weight"
