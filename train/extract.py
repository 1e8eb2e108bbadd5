"""``python -m train.extract``: runs a language model over text and stores its residual stream.

With no flags: the residual stream of SmolLM2-135M after block 9 over State of the Union addresses, about a
minute on 2 CPU cores. Running the same command again resumes, or says that the set is complete.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_sae.backbones.llama import Llama, load_llama, load_tokenizer
from jax_sae.data import ActivationSet, ActivationWriter, open_activations
from jax_sae.errors import InputError

from . import cli
from .assets import MODELS, ensure_model
from .config import differing_fields
from .corpus import Windows, cut_windows, read_documents
from .files import make_writable_folder, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PLAN = "extraction.json"  # in the folder until the set is complete
_PROVENANCE = {"tokens": "tokens.npy", "items": "items.npy", "tokenizer": "tokenizer.json"}
_SHARDS = 16  # so many, within the sizes below: an interrupted run loses at most one
_SHARD_BYTES = (8 * 2**20, 512 * 2**20)


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Store the residual stream of a language model over text. Running the same command again resumes.

    Attributes:
      model: a name (smollm2-135m), a Llama as a .gguf file, or a folder with config.json, model.safetensors
        and tokenizer.json.
      layer: the residual stream after that many blocks.
      inputs: sotu (State of the Union addresses), .txt or .jsonl files, or folders of them.
      out: where the activation set goes; runs/activations/MODEL-layerLAYER without it.
      tokens: how many tokens to run through the model, in windows sampled from the text.
      sequence_length: tokens per window; windows do not overlap.
      batch_size: windows run at one time.
      dtype: of the stored activations.
      holdout: fraction of the windows, from other documents, kept from training as the last rows.
      seed: of the sample and of the split of the documents.
      skip_first: positions left out at the start of every window; position 0 is an attention sink whose norm
        is several times that of any other.
    """

    model: str = "smollm2-135m"
    layer: int = 9
    inputs: tuple[str, ...] = ("sotu",)
    out: Path | None = None
    tokens: int = 163_840
    sequence_length: int = 128
    batch_size: int = 8
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    holdout: float = 0.08
    seed: int = 0
    skip_first: int = 1

    def validate(self) -> None:
        """Refuses values that fit no model.

        Raises:
          InputError: the flag is named.
        """
        least = {"layer": 0, "sequence_length": 2, "batch_size": 1, "seed": 0, "skip_first": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {getattr(self, name)}; expected at least {minimum}")
        if self.tokens < self.sequence_length:
            raise InputError(f"--tokens is {self.tokens}; expected at least one window of {self.sequence_length}")
        if self.skip_first >= self.sequence_length:
            raise InputError(f"--skip-first is {self.skip_first}; expected less than --sequence-length")
        if not 0 <= self.holdout < 1:
            raise InputError(f"--holdout is {self.holdout}; expected a fraction in [0, 1)")

    @property
    def folder(self) -> Path:
        """``--out``, or runs/activations/MODEL-layerLAYER."""
        return self.out or Path("runs", "activations", f"{Path(self.model).stem}-layer{self.layer}")

    @property
    def rows_per_window(self) -> int:
        return self.sequence_length - self.skip_first

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the content of the set, as JSON."""
        settings = dataclasses.asdict(self) | {"inputs": list(self.inputs), "model": model_name(self.model)}
        del settings["out"], settings["batch_size"]
        return settings


def model_name(model: str) -> str:
    """What identifies a model in a set: the name of a default one, or its absolute path."""
    return model if model in MODELS else str(Path(model).resolve())


def extract(config: ExtractConfig) -> Path:
    """Writes the activation set, from where an interrupted run of the same settings left off.

    Returns:
      The folder of the complete set.

    Raises:
      InputError: bad text or a bad model, or a folder that holds another set.
    """
    config.validate()
    out = config.folder
    if (out / "activations.json").exists():
        _refuse_other_settings(out, open_activations(out).source.get("settings", {}), config)
        (out / _PLAN).unlink(missing_ok=True)
        print(f"{out} is already complete with these settings")
        return out
    make_writable_folder(out)
    _refuse_other_files(out)
    path = ensure_model(config.model)
    model, tokenizer = load_llama(path, layers=config.layer), load_tokenizer(path)
    _check_fit(config, model, tokenizer)
    windows = _plan(config, tokenizer, out)
    started = time.perf_counter()
    resumed_at = _write(config, model, windows, out)
    print(_summary(open_activations(out), windows, resumed_at, time.perf_counter() - started))
    return out


def _refuse_other_settings(out: Path, settings: dict[str, Any], config: ExtractConfig) -> None:
    differences = differing_fields(settings, config.settings)
    if differences:
        raise InputError(
            f"{out} holds activations of other settings ({'; '.join(differences)}); use another --out, or "
            "the flags it was made with"
        )


def _refuse_other_files(out: Path) -> None:
    """A folder in use for something else is left alone; files of a run that was killed early are not."""
    if (out / _PLAN).exists():
        return
    others = sorted({file.name for file in out.iterdir()} - set(_PROVENANCE.values()))
    if others:
        raise InputError(f"{out} holds other files ({others[0]}); give --out an empty or a new folder")


def _check_fit(config: ExtractConfig, model: Llama, tokenizer: "Tokenizer") -> None:
    if config.sequence_length > model.config.max_length:
        raise InputError(
            f"--sequence-length is {config.sequence_length}, {config.model} takes at most "
            f"{model.config.max_length}; lower it"
        )
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise InputError(
            f"the tokenizer of {config.model} has {tokenizer.get_vocab_size()} tokens, its embedding "
            f"{model.config.vocab_size}; give the tokenizer of this model"
        )


def _plan(config: ExtractConfig, tokenizer: "Tokenizer", out: Path) -> Windows:
    """The windows to run: those that an interrupted run wrote down, or new ones, written down now."""
    path = out / _PLAN
    if path.exists():
        plan = read_json(path)
        _refuse_other_settings(out, plan["settings"], config)
        tokens, items = (np.load(out / _PROVENANCE[name], allow_pickle=False) for name in ("tokens", "items"))
        return Windows(tokens, items, plan["documents"], plan["holdout"])
    windows = cut_windows(
        read_documents(config.inputs),
        tokenizer,
        n_windows=config.tokens // config.sequence_length,
        sequence_length=config.sequence_length,
        holdout=config.holdout,
        seed=config.seed,
    )
    tokenizer.save(str(out / _PROVENANCE["tokenizer"]))
    np.save(out / _PROVENANCE["tokens"], windows.tokens)
    np.save(out / _PROVENANCE["items"], windows.items)
    write_json(path, {"settings": config.settings, "documents": windows.documents, "holdout": windows.holdout})
    return windows


def _write(config: ExtractConfig, model: Llama, windows: Windows, out: Path) -> int:
    """Runs the model over the windows that are not on disk yet; returns how many rows were."""
    per_window = config.rows_per_window
    writer = _open_writer(config, model.config.d_model, len(windows.tokens), out)
    resumed_at = writer.rows
    first, done = divmod(resumed_at, config.batch_size * per_window)
    with writer, _progress(config, len(windows.tokens), resumed_at // per_window) as bar:
        for rows in _residuals(config, model, windows.tokens, first):
            writer.append(_checked(rows[done:], config))
            bar.update(len(rows[done:]) // per_window * config.sequence_length)
            done = 0
        provenance = _PROVENANCE | {"documents": windows.documents, "first_position": config.skip_first}
        writer.close(holdout_rows=windows.holdout * per_window, provenance=provenance)
    os.remove(out / _PLAN)
    return resumed_at


def _open_writer(config: ExtractConfig, d: int, n_windows: int, out: Path) -> ActivationWriter:
    dtype = jnp.dtype(config.dtype)
    return ActivationWriter(
        out,
        d=d,
        dtype=dtype,
        shard_rows=_shard_rows(n_windows * config.rows_per_window, d * dtype.itemsize),
        tokens_per_item=config.rows_per_window,
        source={
            "model": model_name(config.model),
            "layer": config.layer,
            "site": "residual stream after the block",
            "settings": config.settings,
        },
    )


def _shard_rows(rows: int, row_bytes: int) -> int:
    least, most = _SHARD_BYTES
    return max(1, min(max(rows * row_bytes // _SHARDS, least), most) // row_bytes)


def _residuals(config: ExtractConfig, model: Llama, tokens: np.ndarray, first_batch: int) -> Iterator[np.ndarray]:
    """Rows [batch * rows_per_window, d] of one batch after another; the next one is computed meanwhile."""
    size = config.batch_size
    pending: tuple[jax.Array, int] | None = None
    for start in range(first_batch * size, len(tokens), size):
        batch = tokens[start : start + size]
        filled = np.resize(batch, (size, tokens.shape[1]))  # one shape, one compilation
        rows = _rows(model, filled, config.layer, config.skip_first, config.dtype)
        if pending is not None:
            yield np.asarray(pending[0])[: pending[1]]
        pending = rows, len(batch) * config.rows_per_window
    if pending is not None:
        yield np.asarray(pending[0])[: pending[1]]


@partial(jax.jit, static_argnames=("layer", "skip_first", "dtype"))
def _rows(model: Llama, tokens: jax.Array, layer: int, skip_first: int, dtype: str) -> jax.Array:
    residual = model.residual(tokens, layer)[:, skip_first:]
    return residual.reshape(-1, residual.shape[-1]).astype(dtype)


def _checked(rows: np.ndarray, config: ExtractConfig) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise InputError(
            f"the residual stream of {config.model} after block {config.layer} does not fit into "
            f"{config.dtype}; use --dtype bfloat16 or float32 with another --out"
        )
    return rows


def _progress(config: ExtractConfig, windows: int, done: int) -> tqdm:
    return tqdm(
        total=windows * config.sequence_length,
        initial=done * config.sequence_length,
        unit=" tokens",
        unit_scale=True,
        desc=f"extract layer {config.layer}",
        disable=None,
    )


def _summary(activations: ActivationSet, windows: Windows, resumed_at: int, seconds: float) -> str:
    tokens = windows.tokens.size * (activations.rows - resumed_at) // activations.rows
    contexts = f"{len(windows.tokens):,} contexts of {len(np.unique(windows.items[:, 0]))} documents"
    return (
        f"{activations.path}: {activations.rows:,} rows of {activations.d} numbers from {contexts}, "
        f"{activations.holdout_rows:,} rows held out; {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    cli.run(extract, prog=f"python -m {__package__}.extract")
