"""What the sparsemax benchmark runs before and besides timing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results, sparsemax


def test_sort_definition_on_rows_with_a_known_answer():
    z = np.array([[0.1, 1.1, 0.9, -3.0], [5.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    expected = [[0, 0.6, 0.4, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    np.testing.assert_allclose(sparsemax.sort_definition(z), expected, atol=1e-12)


def test_every_candidate_is_held_to_the_definition():
    z = sparsemax.example_scores((4, 300), 0.1, "float32")
    sparsemax.verify(sparsemax.probability_candidates(z), z, tolerance=1e-6)


def test_a_candidate_that_is_wrong_is_named():
    z = jnp.zeros((1, 4))
    with pytest.raises(AssertionError, match="softened"):
        sparsemax.verify({"softened": lambda: jnp.full((1, 4), 0.26)}, z, tolerance=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_prints_and_writes_every_candidate(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sparsemax, "machine_rates", lambda: {"copy B/s": 1e9})
    monkeypatch.setattr(results, "ROOT", tmp_path)
    sparsemax.main(shapes=("tiny",), dtype=dtype, rounds=1)
    (path,) = tmp_path.rglob("sparsemax.json")
    names = [row["name"] for row in json.loads(path.read_text())["tables"][0]["rows"]]
    assert names[:4] == ["z * 2", "softmax", "jax_sae.sparsemax_threshold", "jax_sae.sparsemax"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
