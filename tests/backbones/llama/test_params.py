"""Reading weights: two formats, the same numbers, and one clear line for a bad file."""

import json

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_sae.backbones.llama import load_gguf, load_huggingface, load_llama
from jax_sae.errors import InputError


def rope_freqs(golden) -> dict:
    """The tensor that llama.cpp's converter writes for rope_type llama3, by the formula of its source."""
    rope = golden["config"]["rope_parameters"]
    if rope["rope_type"] == "default":
        return {}
    low_wavelength = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high_wavelength = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, 8, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / 8)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(rope["factor"])
        else:
            smooth = (32 / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs": np.array(factors, np.float32)}


def test_gguf_gives_the_logits_of_transformers(golden, write_gguf):
    model = load_llama(write_gguf(golden["config"], golden["weights"], **rope_freqs(golden)))
    np.testing.assert_allclose(model.logits(golden["input_ids"]), golden["logits"], atol=2e-4, rtol=1e-5)


def test_quantised_tensors_are_dequantised(tied, write_gguf, tmp_path):
    widths = {"hidden_size": 32, "head_dim": 4, "num_attention_heads": 8, "intermediate_size": 32}
    rng = np.random.default_rng(0)
    shapes = {name: tuple({24: 32, 40: 32}.get(n, n) for n in w.shape) for name, w in tied["weights"].items()}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path = write_gguf(tied["config"] | widths, weights)
    up = "model.layers.1.mlp.up_proj.weight"
    quantised = gguf.quantize(weights[up], gguf.GGMLQuantizationType.Q8_0)
    rounded = gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    assert 0 < np.abs(rounded - weights[up]).max() < 0.05
    assert_reads_quantised(path, tmp_path / "quantised.gguf", quantised, rounded)


def assert_reads_quantised(path, copy, quantised, rounded):
    """Copies a GGUF file with one tensor quantised and reads it back."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(copy, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(load_gguf(copy).blocks.W_up[1], rounded.T)


def test_the_first_blocks_alone(tied, write_huggingface):
    model = load_llama(write_huggingface(tied["config"], tied["weights"]), layers=2)
    assert model.config.n_layers == 2
    np.testing.assert_allclose(model.residual(tied["input_ids"], 2), tied["residual_2"], atol=3e-5)


def test_bfloat16_weights_are_read(tied, write_huggingface):
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in tied["weights"].items()}
    model = load_llama(write_huggingface(tied["config"], weights))
    assert model.embedding.dtype == jnp.float32
    np.testing.assert_array_equal(model.embedding, weights["model.embed_tokens.weight"].astype(np.float32))


def test_shards_with_an_index(tied, write_huggingface):
    folder = write_huggingface(tied["config"], tied["weights"])
    (folder / "model.safetensors").unlink()
    names = sorted(tied["weights"])
    files = {name: f"model-0000{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tied["weights"][name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = load_huggingface(folder)
    np.testing.assert_allclose(model.residual(tied["input_ids"], 3), tied["residual_3"], atol=3e-5)


def test_missing_tensor(tied, write_huggingface):
    del tied["weights"]["model.layers.1.mlp.up_proj.weight"]
    folder = write_huggingface(tied["config"], tied["weights"])
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_llama(folder)


def test_missing_tensor_in_gguf(tied, write_gguf):
    del tied["weights"]["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"model\.gguf has no tensor blk\.1\.ffn_up\.weight"):
        load_llama(write_gguf(tied["config"], tied["weights"]))


def test_tensor_of_another_shape(tied, write_huggingface):
    folder = write_huggingface(tied["config"] | {"intermediate_size": 41}, tied["weights"])
    with pytest.raises(InputError, match=r"W_\w+ of block 0 has shape .*40.*, expected .*41.*"):
        load_llama(folder)


def test_other_architecture_in_gguf(tied, write_gguf):
    with pytest.raises(InputError, match="architecture 'gpt2', expected 'llama'"):
        load_llama(write_gguf(tied["config"], tied["weights"], architecture="gpt2"))


def test_layers_out_of_range(tied, write_huggingface):
    with pytest.raises(InputError, match=r"layer 4 is out of range; .* has 3 blocks"):
        load_llama(write_huggingface(tied["config"], tied["weights"]), layers=4)


def test_incomplete_configuration(tied, write_huggingface):
    del tied["config"]["hidden_size"]
    with pytest.raises(InputError, match=r"config\.json does not say 'hidden_size'"):
        load_llama(write_huggingface(tied["config"], tied["weights"]))


def test_truncated_gguf(tied, write_gguf):
    path = write_gguf(tied["config"], tied["weights"])
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.gguf is not a whole GGUF file"):
            load_llama(path)


def test_truncated_safetensors(tied, write_huggingface):
    folder = write_huggingface(tied["config"], tied["weights"])
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_llama(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"none does not exist; give a \.gguf file or a folder"):
        load_llama(tmp_path / "none")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_llama(tmp_path)
