"""Weights of trained Llamas, from a GGUF file or from a Hugging Face folder."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sae.backbones.llama.gguf_file import GGUFFile
from jax_sae.backbones.llama.modeling import Llama, LlamaConfig
from jax_sae.errors import InputError

Read = Callable[[str], np.ndarray]

# Ours -> the name in a GGUF file, in a Hugging Face file. Matrices there are [out, in], ours [in, out].
_BLOCK_NAMES = {
    "attention_norm": ("attn_norm", "input_layernorm"),
    "W_Q": ("attn_q", "self_attn.q_proj"),
    "W_K": ("attn_k", "self_attn.k_proj"),
    "W_V": ("attn_v", "self_attn.v_proj"),
    "W_O": ("attn_output", "self_attn.o_proj"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "W_gate": ("ffn_gate", "mlp.gate_proj"),
    "W_up": ("ffn_up", "mlp.up_proj"),
    "W_down": ("ffn_down", "mlp.down_proj"),
}
_TOP_NAMES = {
    "embedding": ("token_embd", "model.embed_tokens"),
    "final_norm": ("output_norm", "model.norm"),
    "head": ("output", "lm_head"),
}


def load_llama(path: str | Path, *, layers: int | None = None, dtype: jnp.dtype | None = None) -> Llama:
    """Reads a Llama from wherever it is.

    Args:
      path: a ``.gguf`` file, or a folder with ``config.json`` and ``model.safetensors``.
      layers: read only that many blocks (its residual stream needs no more, its logits do); all without it.
      dtype: of the weight matrices; without it float32 on CPU and bfloat16 elsewhere.

    Raises:
      InputError: the path holds no Llama, another architecture, or not all of its tensors.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a .gguf file or a folder with config.json")
    return (load_huggingface if path.is_dir() else load_gguf)(path, layers=layers, dtype=dtype)


def load_gguf(path: str | Path, *, layers: int | None = None, dtype: jnp.dtype | None = None) -> Llama:
    """Reads a Llama from a GGUF file; quantised tensors are dequantised. See :func:`load_llama`."""
    file = GGUFFile(path)
    factors = None
    if "rope_freqs.weight" in file:
        factors = tuple(map(float, file.read("rope_freqs.weight")))
    tied_head = "output.weight" not in file
    with _missing_key(path):
        config = LlamaConfig.from_gguf(file.metadata, tied_head=tied_head, factors=factors)

    def read_block(name: str, layer: int) -> np.ndarray:
        tensor = file.read(f"blk.{layer}.{_BLOCK_NAMES[name][0]}.weight")
        heads = {"W_Q": config.n_heads, "W_K": config.n_kv_heads}.get(name)
        return tensor if heads is None else _half_split_rows(tensor, heads)

    def read_top(name: str) -> np.ndarray:
        return file.read(f"{_TOP_NAMES[name][0]}.weight")

    return _build(config, read_block, read_top, layers, dtype, path)


def load_huggingface(folder: str | Path, *, layers: int | None = None, dtype: jnp.dtype | None = None) -> Llama:
    """Reads a Llama from ``config.json`` and ``model.safetensors``, whole or in shards with an index.

    See :func:`load_llama`.
    """
    folder = Path(folder)
    with _missing_key(folder / "config.json"):
        config = LlamaConfig.from_huggingface(_read_json(folder / "config.json"))
    with _open_safetensors(folder) as read:

        def read_block(name: str, layer: int) -> np.ndarray:
            return read(f"model.layers.{layer}.{_BLOCK_NAMES[name][1]}.weight")

        def read_top(name: str) -> np.ndarray:
            return read(f"{_TOP_NAMES[name][1]}.weight")

        return _build(config, read_block, read_top, layers, dtype, folder)


def _build(
    config: LlamaConfig,
    read_block: Callable[[str, int], np.ndarray],
    read_top: Read,
    layers: int | None,
    dtype: jnp.dtype | None,
    path: str | Path,
) -> Llama:
    """Fills the shapes of the model with tensors; a tensor of another shape is named."""
    if layers is not None:
        if not 0 <= layers <= config.n_layers:
            raise InputError(f"layer {layers} is out of range; {path} has {config.n_layers} blocks")
        config = dataclasses.replace(config, n_layers=layers)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)

    def fill(location: tuple, wanted: nnx.Variable) -> nnx.Variable:
        *_, name = location
        shape, wanted_dtype = wanted.shape, wanted.dtype
        if name in _TOP_NAMES:
            tensor = _checked(read_top(name), shape, name, path)
            return wanted.replace(jnp.asarray(tensor, wanted_dtype))
        stacked = np.empty(shape, wanted_dtype)
        for layer in range(config.n_layers):
            tensor = read_block(name, layer)
            stacked[layer] = _checked(tensor.T, shape[1:], f"{name} of block {layer}", path)
        return wanted.replace(jnp.asarray(stacked))

    flat = {location: fill(location, wanted) for location, wanted in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _checked(tensor: np.ndarray, shape: tuple[int, ...], name: str, path: str | Path) -> np.ndarray:
    if tensor.shape != shape:
        raise InputError(
            f"{path}: {name} has shape {tensor.shape}, expected {shape} from the configuration; "
            "give the weights and the configuration of one model"
        )
    return tensor


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of W_Q or W_K [heads * head_dim, d] from adjacent pairs (GGUF) to pairs half a head apart."""
    rows, d = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)


@contextlib.contextmanager
def _open_safetensors(folder: Path) -> Iterator[Read]:
    """A function from tensor name to array over ``model.safetensors`` or the shards of its index."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    with contextlib.ExitStack() as stack:

        def open_file(file: str) -> safe_open:
            if not (folder / file).is_file():
                raise InputError(f"{folder / file} does not exist; give a folder with model.safetensors")
            try:
                return stack.enter_context(safe_open(folder / file, framework="numpy"))
            except SafetensorError as error:
                raise InputError(f"{folder / file} is damaged ({error}); fetch it again") from error

        if index.is_file():
            files = _read_json(index)["weight_map"]
            opened = {file: open_file(file) for file in sorted(set(files.values()))}
            handles = {name: opened[file] for name, file in files.items()}
        else:
            handle = open_file("model.safetensors")
            handles = dict.fromkeys(handle.keys(), handle)

        def read(name: str) -> np.ndarray:
            if name not in handles:
                raise InputError(f"{folder} has no tensor {name}; give a whole Llama")
            return handles[name].get_tensor(name)

        yield read


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a Hugging Face folder with config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from error


@contextlib.contextmanager
def _missing_key(path: str | Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise InputError(f"{path} does not say {error}; give the configuration of a Llama") from error
