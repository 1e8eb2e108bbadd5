"""Concepts in context: against brute force over a small set with provenance."""

import numpy as np
import pytest

from jax_sae import SAEConfig, init_stats
from jax_sae.data import ActivationWriter, open_activations
from jax_sae.evaluation import concepts

D, M, ITEMS, LENGTH = 8, 20, 6, 5
PER_ITEM = LENGTH - 1


@pytest.fixture(scope="module")
def model():
    from flax import nnx

    from jax_sae import SparseAutoencoder

    return SparseAutoencoder(SAEConfig.preset("topk", D, M, k=3), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def stats(model):
    return init_stats(model.config)


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """Six texts of five tokens, position 0 left out; two of the tokens are the halves of one character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("set")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    words = ["abcde", "fghij", "k lmn", "x\u00e9<y", "nopqr", "stuvw"]
    tokens = np.array([encoding.ids for encoding in tokenizer.encode_batch(words)], np.int32)
    np.save(path / "tokens.npy", tokens)
    np.save(path / "items.npy", np.array([[i // 2, 5 * (i % 2)] for i in range(ITEMS)], np.int32))
    rows = np.random.default_rng(0).standard_normal((ITEMS * PER_ITEM, D)).astype(np.float32)
    with ActivationWriter(path, d=D, tokens_per_item=PER_ITEM) as writer:
        writer.append(rows)
        writer.close(
            holdout_rows=2 * PER_ITEM,
            provenance={
                "tokens": "tokens.npy",
                "items": "items.npy",
                "documents": ["first", "second", "third"],
                "first_position": 1,
                "tokenizer": "tokenizer.json",
            },
        )
    return open_activations(path)


def dense(model, stats, activations):
    return np.asarray(model.encode(activations.read(0, activations.rows), stats))


@pytest.mark.parametrize("batch_size", [1, 9, 1024])
def test_peaks_are_the_strongest_rows_one_per_item(model, stats, activations, batch_size):
    found = concepts.find_peaks(model, stats, activations, 0, activations.rows, n_peaks=3, batch_size=batch_size)
    a = dense(model, stats, activations)
    np.testing.assert_array_equal(found.count, (a != 0).sum(0))
    np.testing.assert_allclose(found.total, a.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.energy, (a**2).sum(0), rtol=1e-5, atol=1e-6)
    by_item = np.where(a != 0, a, -np.inf).reshape(ITEMS, PER_ITEM, M)
    for concept in range(M):
        best = by_item[:, :, concept].max(1)
        order = np.argsort(-best, kind="stable")[:3]
        np.testing.assert_allclose(found.peaks[concept], best[order], rtol=1e-6)
        for rank, item in enumerate(order):
            if np.isfinite(best[item]):
                assert found.rows[concept][rank] == item * PER_ITEM + by_item[item, :, concept].argmax()


def test_contexts_align_tokens_values_and_peak(model, stats, activations):
    a = dense(model, stats, activations)
    described = concepts.describe_concepts(
        model, stats, activations, concepts.find_peaks(model, stats, activations, 0, activations.rows), 10**6
    )
    assert {entry["id"] for entry in described} == set(np.flatnonzero((a != 0).any(0)))
    tokens = activations.provenance.tokens
    for entry in described:
        assert entry["max_activation"] == pytest.approx(a[:, entry["id"]].max(), rel=1e-6)
        assert entry["mean_activation"] == pytest.approx(a[a[:, entry["id"]] != 0, entry["id"]].mean(), rel=1e-5)
        rows = [context["row"] for context in entry["contexts"]]
        assert len({row // PER_ITEM for row in rows}) == len(rows), "one context per item"
        for context in entry["contexts"]:
            item, within = divmod(context["row"], PER_ITEM)
            assert context["source"] == ["first", "second", "third"][item // 2]
            assert context["peak"] == within + 1 and len(context["tokens"]) == LENGTH
            assert context["values"][0] is None, "position 0 has no row"
            expected = a[item * PER_ITEM : (item + 1) * PER_ITEM, entry["id"]]
            np.testing.assert_allclose(context["values"][1:], expected, rtol=1e-5, atol=1e-7)
    assert tokens.shape == (ITEMS, LENGTH)


def test_half_a_character_and_spaces_are_text(model, stats, activations):
    (context,) = concepts.describe_inputs(model, stats, activations, np.array([3 * PER_ITEM]))
    text = "".join(context["tokens"])
    assert text.startswith("x") and "<y" in text and "\ufffd" in text
    (context,) = concepts.describe_inputs(model, stats, activations, np.array([2 * PER_ITEM]))
    assert "".join(context["tokens"]) == "k lmn"
    assert context["values"] == [None, 3.0, 3.0, 3.0, 3.0], "TopK uses three concepts on every token"


def test_without_provenance_a_context_is_its_own_row(model, stats, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((10, D)).astype(np.float32))
    plain = open_activations(tmp_path / "rows.npy")
    (context,) = concepts.describe_inputs(model, stats, plain, np.array([4]))
    assert context == {"source": None, "row": 4, "tokens": None, "values": [3.0], "peak": 0}


def firing(count, energy):
    count = np.array(count)
    return concepts.Firing(count, count * 1.0, np.array(energy, float), np.zeros((len(count), 1)), None)


def test_concepts_are_chosen_by_energy_in_turns_of_frequency():
    counts = [400, 500, 20, 25, 1, 2, 0, 2000]  # of 10,000 rows: frequent, rare, rarest, silent, always on
    chosen = concepts.choose_concepts(firing(counts, [1, 2, 3, 4, 6, 5, 9, 99]), 10_000, np.ones(8), 8)
    np.testing.assert_array_equal(chosen, [1, 4, 0, 5, 3, 2])
    longer = np.array([9.0, 1, 1, 1, 1, 1, 1, 1])
    assert concepts.choose_concepts(firing(counts, [1, 2, 3, 4, 6, 5, 9, 99]), 10_000, longer, 1) == [0]


def test_histograms_count_every_input_and_every_concept():
    active = np.array([3, 3, 7, 0])
    assert concepts.active_histogram(active) == {"edges": list(range(9)), "counts": [1, 0, 0, 2, 0, 0, 0, 1]}
    counts = np.array([0, 0, 1, 100, 101, 999, 1000])
    histogram = concepts.frequency_histogram(counts, 1000)
    edges = histogram["log10_edges"]
    assert histogram["never"] == 2 and sum(histogram["counts"]) == 5
    assert edges[0] == -3.0 and edges[-1] == 0.0 and -1.0 in edges
    assert histogram["counts"][edges.index(-1.0)] == 2, "one tenth belongs to the bin that begins there"
    assert histogram["counts"][0] == 1 and histogram["counts"][-1] == 2


def test_extreme_inputs_are_of_different_items():
    active = np.array([5, 1, 9, 2, 2, 2, 8, 0, 7])
    few, many = concepts.extreme_inputs(active, 3, 2)
    np.testing.assert_array_equal(few, [7, 1])
    np.testing.assert_array_equal(many, [2, 6])
