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
    assert preset("attention_relu").encoder == "attention" and preset("attention_relu").l1_coefficient > 0
    assert preset("topk").k == 32 and preset("topk").aux_k == 8
    assert preset("batch_topk").activation == "batch_topk"


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
        (dict(name="sparsemax", unit_norm_decoder=True), "no W_dec"),
    ],
)
def test_bad_values_are_named(arguments, message):
    arguments = dict(d_in=16, n_concepts=64) | arguments
    with pytest.raises(InputError, match=message):
        SAEConfig.preset(arguments.pop("name"), **arguments)
