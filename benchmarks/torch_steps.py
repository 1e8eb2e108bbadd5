"""Training steps in PyTorch to hold ours against: the paper's equations, SAELens, dictionary_learning.

Each starts from given parameters and goes one step further with every call, which returns the loss before that step.
torch is imported where it is used: without it, and without a peer, benchmarks run and say what they left out.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_sae import SAEConfig, keep_freed_memory

Parameters = Mapping[str, np.ndarray]
TorchStep = Callable[[Any], float]
FREQUENCY_CAP = 0.1


def missing(*packages: str) -> list[str]:
    """Those of ``packages`` that are not installed here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def prepare(*packages: str) -> None:
    """First thing in a benchmark: keeps freed memory, for all candidates, and says which peers are left out.

    Torch's threads, if it is imported later, sleep while they wait, as JAX's do. By default they spin, which on few
    cores keeps a core from the thread that they wait for: a step of 1 ms took 180.
    """
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in missing(*packages):
        print(f"{name} is not installed: left out")


def torch_device() -> str:
    """Where the peers run: on the GPU if torch has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def paper_step(parameters: Parameters, learning_rate: float, *, materialise: bool = True) -> TorchStep:
    """The Sparsemax SAE's training step with Adam, from the paper's equations: raw scores on a constant support.

    Args:
      parameters: ``concepts [M, d]``, ``W_K [d, d]``, ``W_V [d, d]``.
      learning_rate: of Adam.
      materialise: compute ``concepts W_K`` and ``concepts W_V`` in every step, as the published code does; otherwise
        multiply the rows by the projections, which gives the same numbers in far fewer operations.
    """
    import torch

    names = ("concepts", "W_K", "W_V")
    concepts, w_k, w_v = leaves = [
        torch.tensor(np.asarray(parameters[name]), device=torch_device(), requires_grad=True) for name in names
    ]
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    frequency, steps = torch.zeros(len(concepts), device=concepts.device), 0

    def step(x: Any) -> float:
        nonlocal frequency, steps
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        u = x / norm
        scores = u @ (concepts @ w_k).T if materialise else (u @ w_k.T) @ concepts.T
        scores = scores * (frequency <= FREQUENCY_CAP)
        support = (scores > sparsemax_threshold(scores.detach())).to(scores.dtype)
        activations = scores * support
        y = activations @ (concepts @ w_v) if materialise else (activations @ concepts) @ w_v
        loss = 10 * torch.mean((y * norm - x) ** 2 / norm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            fired = (activations > 0).to(x.dtype).mean(dim=0)
            frequency, steps = (frequency * steps + fired) / (steps + 1), steps + 1
        return float(loss.detach())

    return step


def sparsemax_threshold(z: Any) -> Any:
    """[B, 1] thresholds of the rows of ``z [B, M]`` by a sort: Martins and Astudillo 2016, Algorithm 1."""
    import torch

    descending = torch.sort(z, dim=-1, descending=True).values
    sums = torch.cumsum(descending, dim=-1) - 1
    places = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    count = torch.sum(descending * places > sums, dim=-1, keepdim=True)
    return torch.gather(sums, -1, count - 1) / count


def saelens_step(
    config: SAEConfig, parameters: Parameters, learning_rate: float, rows: int, *, sparse: bool = False
) -> TorchStep:
    """The step of SAELens' trainer on its TopK autoencoder, with its sparse activations if ``sparse``."""
    config_of, trainer_of = (importlib.import_module(f"sae_lens.{name}") for name in ("config", "training.sae_trainer"))
    sae = saelens_topk(config, parameters, sparse=sparse)
    settings = config_of.SAETrainerConfig(
        total_training_samples=rows * 1_000_000,
        train_batch_size_samples=rows,
        lr=learning_rate,
        lr_end=learning_rate,
        device=torch_device(),
    )
    trainer = trainer_of.SAETrainer(settings, sae, iter(()))
    return lambda x: float(trainer.step(x).loss.detach())


def saelens_topk(config: SAEConfig, parameters: Parameters | None = None, *, sparse: bool = False) -> Any:
    """SAELens' TopK autoencoder with the widths and k of ``config``, and our parameters where they are given."""
    import torch

    topk = importlib.import_module("sae_lens.saes.topk_sae")
    settings = topk.TopKTrainingSAEConfig(
        d_in=config.d_in,
        d_sae=config.n_concepts,
        k=config.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,  # on a CPU torch has no derivative of that with sparse activations
        apply_b_dec_to_input=True,
        device=torch_device(),
    )
    sae = topk.TopKTrainingSAE(settings)
    with torch.no_grad():
        for name, value in (parameters or {}).items():
            getattr(sae, name).copy_(torch.tensor(np.asarray(value)))
    return sae


def dictionary_learning_step(config: SAEConfig, parameters: Parameters, learning_rate: float) -> TorchStep:
    """The step of dictionary_learning's TopK trainer; b_dec was chosen before, its step 0 does nothing else."""
    import torch

    trainer = importlib.import_module("dictionary_learning.trainers.top_k").TopKTrainer(
        **dictionary_learning_settings(config, learning_rate, steps=1_000_000)
    )
    given = {name: torch.tensor(np.asarray(value)) for name, value in parameters.items()}
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(given["W_enc"].T)
        trainer.ae.encoder.bias.copy_(given["b_enc"])
        trainer.ae.decoder.weight.copy_(given["W_dec"].T)
        trainer.ae.b_dec.copy_(given["b_dec"])
    return lambda x: float(trainer.update(1, x))


def dictionary_learning_settings(config: SAEConfig, learning_rate: float, steps: int) -> dict[str, Any]:
    """What dictionary_learning's TopK trainer takes."""
    return {
        "steps": steps,
        "activation_dim": config.d_in,
        "dict_size": config.n_concepts,
        "k": config.k,
        "layer": 0,
        "lm_name": "benchmark",
        "lr": learning_rate,
        "warmup_steps": 0,
        "device": torch_device(),
    }
