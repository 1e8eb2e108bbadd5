"""The order of rows: permutations, purity, mixing, and where a batch sits in the stream."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from jax_sae.data import BatchOrder
from jax_sae.errors import InputError

SHAPES = [  # rows, batch_size, block_rows, window_blocks
    pytest.param(64, 8, 4, 4, id="all even"),
    pytest.param(61, 8, 4, 4, id="ragged block, batches straddle epochs"),
    pytest.param(61, 61, 4, 4, id="a batch is an epoch"),
    pytest.param(61, 50, 3, 2, id="a batch spans many windows"),
    pytest.param(5, 2, 8, 8, id="less than a block"),
    pytest.param(1, 1, 1, 1, id="one row"),
]


def stream(order: BatchOrder, start: int, stop: int) -> np.ndarray:
    """Positions ``start`` to ``stop`` of the stream of rows."""
    first, last = start // order.batch_size, -(-stop // order.batch_size)
    rows = np.concatenate([order.indices(batch) for batch in range(first, last)])
    return rows[start - first * order.batch_size :][: stop - start]


@pytest.mark.parametrize(("rows", "batch_size", "block_rows", "window_blocks"), SHAPES)
def test_every_epoch_is_a_permutation_and_every_batch_is_full(rows, batch_size, block_rows, window_blocks):
    order = BatchOrder(rows, batch_size, 0, block_rows, window_blocks)
    for epoch in range(4):
        drawn = stream(order, epoch * rows, (epoch + 1) * rows)
        np.testing.assert_array_equal(np.sort(drawn), np.arange(rows))
        np.testing.assert_array_equal(
            np.concatenate([order.window(epoch, window) for window in range(order.windows)]), drawn
        )
    batch = order.indices(3)
    assert batch.shape == (batch_size,) and batch.dtype == np.int64


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = []
    for seed in (0, 1):
        whole = stream(BatchOrder(200, 8, seed, 10, 4), 0, 400)
        orders += [whole[:200], whole[200:]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.1


def test_starting_anywhere_gives_the_same_tail():
    arguments = dict(rows=61, batch_size=8, seed=3, block_rows=4, window_blocks=4)
    whole = [BatchOrder(**arguments).indices(batch) for batch in range(40)]
    for start in (0, 7, 8, 23, 39):
        resumed = BatchOrder(**arguments)
        for batch in range(start, 40):
            np.testing.assert_array_equal(resumed.indices(batch), whole[batch])


def test_an_index_depends_on_nothing_that_was_asked_before():
    order = BatchOrder(61, 8, 3, 4, 4)
    forward = [order.indices(batch) for batch in range(30)]
    for batch in np.random.default_rng(0).permutation(30):
        np.testing.assert_array_equal(order.indices(int(batch)), forward[batch])


def test_another_process_draws_the_same_rows():
    program = "from jax_sae.data import BatchOrder; print(BatchOrder(61, 8, 3, 4, 4).indices(10**6).tolist())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(BatchOrder(61, 8, 3, 4, 4).indices(10**6).tolist())


def test_a_batch_that_straddles_epochs_ends_one_and_begins_the_next():
    order = BatchOrder(rows=10, batch_size=4, seed=0, block_rows=2, window_blocks=2)
    assert {piece.epoch for piece in order.pieces(2)} == {0, 1}
    seen = np.concatenate([order.indices(0), order.indices(1), order.indices(2)[:2]])
    np.testing.assert_array_equal(np.sort(seen), np.arange(10))


def test_pieces_tile_the_stream():
    order = BatchOrder(61, 50, 3, 4, 2)
    position = 0
    for batch in range(12):
        for piece in order.pieces(batch):
            assert order.window_start(piece.epoch, piece.window) + piece.start == position
            position += piece.stop - piece.start
        assert position == (batch + 1) * 50


def test_rows_of_a_window_are_mixed_evenly():
    order = BatchOrder(rows=16_384, batch_size=256, seed=0, block_rows=64, window_blocks=32)
    rows = stream(order, 0, 32 * 64)
    blocks, places = rows // 64, rows % 64
    assert len(np.unique(blocks)) == 32  # one window holds 32 whole blocks
    neighbours = np.mean(blocks[1:] == blocks[:-1])  # 63 / 2047 by chance, standard error 0.004
    assert abs(neighbours - 63 / 2047) < 0.02
    for quantity in (rows, blocks, places):  # no trend along the window; standard error 0.022
        assert abs(np.corrcoef(quantity, np.arange(len(rows)))[0, 1]) < 0.09
    for batch in range(8):  # 256 draws over 32 blocks: 8 of each, standard deviation 2.6
        counts = np.bincount(np.unique(order.indices(batch) // 64, return_inverse=True)[1])
        assert len(counts) >= 30 and counts.max() < 24


def test_a_window_draws_its_blocks_from_the_whole_set_and_anew_in_every_epoch():
    order = BatchOrder(rows=16_384, batch_size=256, seed=0, block_rows=64, window_blocks=32)
    first, second = (np.unique(order.window(epoch, 0) // 64) for epoch in (0, 1))
    assert len(np.intersect1d(first, second)) < 16  # 4 of 32 blocks by chance
    assert abs(first.mean() - 127.5) < 50  # of 256 blocks; standard error 12


@pytest.mark.parametrize("name", ["rows", "batch_size", "block_rows", "window_blocks"])
def test_sizes_below_one_are_refused(name):
    order = BatchOrder(10, 4, 0)
    with pytest.raises(InputError, match=rf"^{name} is 0; expected at least 1$"):
        dataclasses.replace(order, **{name: 0})


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="^a batch has 11 rows but the set 10; use a smaller batch or"):
        BatchOrder(10, 11, 0)
