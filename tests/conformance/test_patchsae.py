"""The ReLU SAE of PatchSAE, the vision baseline: forward and backward passes, penalties, masks.

Ghost gradients, its way to revive dead concepts, are not here: the field has dropped them for AuxK.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import SAEConfig, init_stats, sae_loss
from tests.conformance.golden import close, same_support, with_parameters

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# Recorded, and not compared: they hold ghost gradients.
GHOSTS = {"dead_mask"} | {
    f"{prefix}{name}"
    for prefix in ("dead_", "tok_")
    for name in ("mse_loss_ghost_resid", *(f"grad_{name}" for name in NAMES))
}


def setup(g):
    m, d = g["W_dec"].shape
    config = SAEConfig(d, m, loss="mse_over_norm", sparsity_coefficient=g.arguments["l1_coefficient"])
    return with_parameters(config, **{name: g[name] for name in NAMES}), init_stats(config)


@pytest.mark.golden("patchsae_relu_forward")
@pytest.mark.parametrize(("prefix", "inputs"), [("nodead_", "x2"), ("dead_", "x2"), ("tok_", "x3")])
def test_forward(golden, prefix, inputs):
    model, stats = setup(golden)
    x, g = golden[inputs], golden.part(prefix)
    weights = np.ones(x.shape[:-1], np.float32)
    if x.ndim == 3:
        weights[:, 0] = golden.arguments["mse_cls_coefficient"]
    loss = functools.partial(sae_loss, row_weights=jnp.asarray(weights.reshape(-1)))
    rows = jnp.asarray(x.reshape(-1, x.shape[-1]))
    (value, (out, terms)), grads = jax.value_and_grad(loss, has_aux=True)(model, stats, rows, 0)
    activations, x_hat = (g[name].reshape(len(rows), -1) for name in ("feature_acts", "sae_out"))
    same_support(out.activations, activations)
    close(out.activations, activations, name="activations")
    close(out.x_hat, x_hat, name="x_hat")
    close(terms["reconstruction"], g["mse_loss"], name="reconstruction")
    close(terms["sparsity"], g["l1_loss"], name="l1")
    close(value, g["loss"] - g["mse_loss_ghost_resid"], name="loss")
    for name in NAMES:
        if f"{prefix}grad_{name}" not in GHOSTS:
            close(getattr(grads, name)[...], g[f"grad_{name}"], name=f"gradient of {name}")


@pytest.mark.golden("patchsae_relu_forward")
def test_what_is_left_out_is_ghost_gradients(golden):
    assert set(golden) >= GHOSTS
    assert golden["nodead_mse_loss_ghost_resid"] == 0
    for prefix in ("dead_", "tok_"):
        assert golden[f"{prefix}mse_loss_ghost_resid"] > 0


@pytest.mark.golden("patchsae_relu_forward")
@pytest.mark.parametrize("case", ["on", "off"])
def test_masked_concepts(golden, case):
    """``forward_clamp`` with the concepts of a class kept (on) or removed (off)."""
    model, stats = setup(golden)
    activations = model.encode(jnp.asarray(golden["x3"]), stats)
    chosen = np.isin(np.arange(activations.shape[-1]), golden["cls_features"])
    activations = jnp.where((chosen == (case == "on"))[None, None], activations, 0)
    same_support(activations, golden[f"clamp_{case}_feature_acts"])
    close(activations, golden[f"clamp_{case}_feature_acts"], name="activations")
    close(model.decode(activations, stats), golden[f"clamp_{case}_sae_out"], name="x_hat")
