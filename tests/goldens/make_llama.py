"""Writes llama_*.npz: what the Llama of Hugging Face transformers computes, on CPU in float32.

Run it where torch and transformers are installed (made with torch 2.13.0 and transformers 5.24.0)::

    python tests/goldens/make_llama.py

Each file holds ``config`` (the JSON of config.json, as bytes), the weights under their Hugging Face names,
``input_ids`` [2, 11], ``residual_0`` (the embedding) to ``residual_<layers>`` (the residual stream after each
block, before the final norm) and ``logits``.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
CASES = {
    # Grouped keys and values, tied embedding, the wavelengths of SmolLM2.
    "llama_tied": {
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    # A head of its own, heads wider than hidden_size / heads, the rescaled wavelengths of Llama 3.1.
    "llama_scaled": {
        "tie_word_embeddings": False,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def golden(settings: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, inputs and outputs of one random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, **settings)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    input_ids = torch.randint(config.vocab_size, (2, 11))
    residuals = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: residuals.append(out))
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, out: residuals.append(out))
    with torch.no_grad():
        logits = model(input_ids).logits
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    kept = {key: value for key, value in config.to_dict().items() if key in KEPT}
    return {
        "config": np.frombuffer(json.dumps(kept).encode(), np.uint8),
        "input_ids": input_ids.numpy().astype(np.int32),
        "logits": logits.numpy(),
        **{f"residual_{i}": residual.numpy() for i, residual in enumerate(residuals)},
        **weights,
    }


KEPT = {
    *SHAPE,
    "model_type",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
}

if __name__ == "__main__":
    for name, settings in CASES.items():
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **golden(settings))
