"""SAEConfig: presets are what their names say, and values that do not fit together are refused."""

from typing import get_args

import pytest

from jax_sae import InputError, Preset, SAEConfig


@pytest.mark.parametrize("name", get_args(Preset))
def test_every_preset_is_hashable_and_keeps_its_shapes(name):
    config = SAEConfig.preset(name, d_in=16, n_concepts=64)
    assert hash(config) == hash(SAEConfig.preset(name, d_in=16, n_concepts=64))
    assert (config.d_in, config.n_concepts) == (16, 64)


def test_presets_differ_in_what_defines_them():
    preset = lambda name: SAEConfig.preset(name, d_in=16, n_concepts=64)
    assert preset("sparsemax").encoder == "attention" and preset("sparsemax").values == "scores"
    assert preset("sparsemax").frequency_cap == 0.1
    paper = preset("sparsemax_paper")
    assert paper.values == "probabilities" and paper.query_projection and paper.score_scale == 0.25
    assert preset("mlp_sparsemax").encoder == "mlp" and preset("mlp_sparsemax").activation == "sparsemax"
    assert preset("attention_relu").encoder == "attention" and preset("attention_relu").sparsity_coefficient > 0
    assert preset("topk").k == 32 and preset("topk").aux_k == 8
    assert preset("batch_topk").activation == "batch_topk" and preset("batch_topk").group_sizes == (64,)
    matryoshka = preset("matryoshka_batch_topk")
    assert matryoshka.activation == "batch_topk" and matryoshka.group_sizes == (2, 4, 8, 16, 34)
    assert preset("jumprelu").activation == "jumprelu" and preset("jumprelu").sparsity_loss == "l0"
    assert preset("gated").activation == "gated" and preset("gated").encoder == "mlp"
    assert preset("entmax").activation == "entmax" and preset("entmax").values == "scores"


@pytest.mark.parametrize(
    ("fractions", "n_concepts", "sizes"),
    [
        ((), 7, (7,)),
        ((1.0,), 7, (7,)),
        ((0.5, 0.5), 7, (3, 4)),
        ((0.3, 0.3, 0.4), 10, (3, 3, 4)),
        ((1 / 3, 1 / 3, 1 / 3), 100, (33, 33, 34)),
    ],
)
def test_groups_cover_the_dictionary(fractions, n_concepts, sizes):
    assert SAEConfig.preset("relu", 4, n_concepts, group_fractions=fractions).group_sizes == sizes


def test_settings_that_do_nothing_are_not_refused():
    assert SAEConfig.preset("relu", 16, 64, sparsity_loss="l0", sparsity_coefficient=0.0).sparsity_loss == "l0"
    assert SAEConfig.preset("relu", 16, 64, alpha=1.0).alpha == 1.0


def test_overrides_win_over_the_preset():
    assert SAEConfig.preset("topk", 16, 64, k=5, aux_k=0).k == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="topp"), "preset 'topp' is unknown; expected one of sparsemax"),
        (dict(name="topk", k=65), "k is 65 with 64 concepts"),
        (dict(name="batch_topk", k=0), "k is 0 with 64 concepts"),
        (dict(name="relu", n_concepts=0), "n_concepts is 0"),
        (dict(name="relu", d_in=0), "d_in is 0"),
        (dict(name="relu", kk=3), "no field kk"),
        (dict(name="relu", activation="gelu"), "activation is 'gelu'; expected one of 'relu'"),
        (dict(name="sparsemax", frequency_cap=0.0), "frequency_cap is 0.0"),
        (dict(name="topk", aux_k=65), "aux_k is 65"),
        (dict(name="topk", aux_k=-1), "aux_k is -1"),
        (dict(name="sparsemax", unit_norm_decoder=True), "no W_dec"),
        (dict(name="jumprelu", bandwidth=0.0), "bandwidth is 0.0; expected a positive number"),
        (dict(name="jumprelu", bandwidth=float("nan")), "bandwidth is nan"),
        (dict(name="entmax", alpha=1.0), "alpha is 1.0; expected a number above 1"),
        (dict(name="entmax", alpha=float("nan")), "alpha is nan"),
        (dict(name="jumprelu", target_l0=0.0), "target_l0 is 0.0; expected above 0"),
        (
            dict(name="relu", group_fractions=(0.5, 0.4)),
            r"group_fractions are \(0.5, 0.4\); expected parts of at least",
        ),
        (dict(name="relu", group_fractions=(0.01, 0.99)), "group_fractions are .* at least one of 64"),
        (dict(name="relu", group_fractions=(1.5, -0.5)), "group_fractions are"),
        (dict(name="gated", encoder="attention", unit_norm_decoder=False), "'gated' needs the biases of encoder 'mlp'"),
        (dict(name="entmax", learn_alpha=True), "learn_alpha is set; it needs activation 'entmax' and values"),
        (dict(name="sparsemax_paper", learn_alpha=True), "learn_alpha is set"),
        (dict(name="relu", sparsity_loss="l0"), "sparsity_loss is 'l0' for activation 'relu'"),
        (dict(name="relu", sparsity_loss="l2"), "sparsity_loss is 'l2'; expected one of 'l1', 'l0', 'tanh'"),
        (
            dict(name="gated", pre_activation_coefficient=0.1),
            "pre_activation_coefficient is set for activation 'gated'",
        ),
    ],
)
def test_bad_values_are_named(arguments, message):
    arguments = dict(d_in=16, n_concepts=64) | arguments
    with pytest.raises(InputError, match=message):
        SAEConfig.preset(arguments.pop("name"), **arguments)
