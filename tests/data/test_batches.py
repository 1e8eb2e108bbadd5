"""Batches against plain indexing, on one host and on several, and their way to the devices."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_sae.data import (
    ActivationSet,
    ActivationWriter,
    BatchOrder,
    BatchSource,
    load_batches,
    open_activations,
    prefetch_to_device,
)
from jax_sae.errors import InputError

ROWS = (np.arange(97)[:, None] + np.float32([0, 0.25, 0.5])).astype(np.float32)
ORDERS = [  # batch_size, block_rows, window_blocks
    pytest.param(8, 4, 4, id="small windows"),
    pytest.param(12, 5, 1, id="one block a window"),
    pytest.param(88, 4, 2, id="a batch spans many windows"),
    pytest.param(16, 256, 256, id="one window an epoch"),
]


@pytest.fixture
def activations(tmp_path) -> ActivationSet:
    return write(tmp_path / "set")


def write(folder: Path, dtype=np.float32, holdout_rows: int = 0) -> ActivationSet:
    with ActivationWriter(folder, d=3, dtype=dtype, shard_rows=20) as writer:
        writer.append(ROWS)
        return open_activations(writer.close(holdout_rows=holdout_rows))


# Random access


@pytest.mark.parametrize("process_count", [1, 4])
@pytest.mark.parametrize(("batch_size", "block_rows", "window_blocks"), ORDERS)
def test_a_batch_is_the_rows_of_its_indices(activations, batch_size, block_rows, window_blocks, process_count):
    order = BatchOrder(97, batch_size, 0, block_rows, window_blocks)
    sources = [
        BatchSource(activations, order, 30, process_index=process, process_count=process_count)
        for process in range(process_count)
    ]
    parts = [[source[batch] for source in sources] for batch in range(len(sources[0]))]  # all kept: none is reused
    for batch, part in enumerate(parts):
        assert {piece.shape for piece in part} == {(batch_size // process_count, 3)}
        np.testing.assert_array_equal(np.concatenate(part), ROWS[order.indices(batch)])


def test_batches_in_any_order(activations):
    order = BatchOrder(97, 8, 0, 4, 4)
    source = BatchSource(activations, order, 40)
    for batch in np.random.default_rng(0).integers(40, size=60):
        np.testing.assert_array_equal(source[batch], ROWS[order.indices(int(batch))])


def test_rows_removed_from_the_set_never_come_up(activations):
    kept = activations.without_rows(np.array([0, 20, 21, 96]))
    order = BatchOrder(93, 8, 0, 4, 4)
    source = BatchSource(kept, order, 24)
    expected = np.delete(ROWS, [0, 20, 21, 96], axis=0)
    for batch in range(24):
        np.testing.assert_array_equal(source[batch], expected[order.indices(batch)])


@pytest.mark.parametrize("process_count", [1, 4])
def test_two_windows_are_kept_and_every_row_is_read_once_an_epoch(activations, monkeypatch, process_count):
    buffers, taken = {}, []
    take = activations.take

    def watched(indices, out=None):
        buffers[id(out.base)] = out.base
        taken.extend(indices)
        return take(indices, out)

    monkeypatch.setattr(activations, "take", watched)
    order = BatchOrder(97, 8, 0, 4, 4)
    for process in range(process_count):
        source = BatchSource(activations, order, 97, process_index=process, process_count=process_count)
        for batch in range(97):  # 8 epochs exactly
            source[batch]
    assert len(buffers) == 2 * process_count
    assert all(buffer.shape == (16, 3) for buffer in buffers.values())
    np.testing.assert_array_equal(np.bincount(taken), np.full(97, 8))


def test_the_next_window_is_read_and_the_one_after_it_announced(activations, monkeypatch):
    order, taken, announced = BatchOrder(97, 8, 0, 4, 4), set(), set()
    take = activations.take

    def watched(indices, out=None):
        taken.update(indices.tolist())
        return take(indices, out)

    monkeypatch.setattr(activations, "take", watched)
    monkeypatch.setattr(activations, "announce", lambda indices: announced.update(indices.tolist()))
    windows = [set(order.window(0, window).tolist()) for window in range(order.windows)]
    source = BatchSource(activations, order, 12)
    for batch in (0, 1):  # both of the first window
        source[batch]
        wait_for(lambda: (taken, announced) == (windows[0] | windows[1], windows[1] | windows[2]))
    for batch in range(2, 12):
        source[batch]
    assert taken | announced == set().union(*windows) and announced.isdisjoint(windows[0])


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_memory_and_threads_go_with_the_source(activations, monkeypatch):
    buffers, take, before = [], activations.take, threading.active_count()

    def watched(indices, out=None):
        buffers.append(weakref.ref(out.base))
        return take(indices, out)

    monkeypatch.setattr(activations, "take", watched)
    gc.disable()  # nothing has to wait for it
    try:
        source = BatchSource(activations, BatchOrder(97, 8, 0, 4, 4), 97)
        source[0], source[2]
        assert threading.active_count() > before and any(buffer() is not None for buffer in buffers)
        del source
        wait_for(lambda: all(buffer() is None for buffer in buffers) and threading.active_count() <= before)
    finally:
        gc.enable()


def test_a_source_ends(activations):
    source = BatchSource(activations, BatchOrder(97, 8, 0), 5)
    assert len(list(source)) == len(source) == 5
    for batch in (-1, 5):
        with pytest.raises(IndexError, match=f"^batch {batch} of 5$"):
            source[batch]


def test_a_read_that_failed_is_made_again(activations, monkeypatch):
    order = BatchOrder(97, 8, 0, 4, 4)
    second, take = order.window(0, 1), activations.take

    def spoil(indices, out):
        if np.isin(indices, second).any():
            out[:] = np.nan
            raise OSError("the disk is gone")
        return take(indices, out)

    monkeypatch.setattr(activations, "take", spoil)
    source = BatchSource(activations, order, 12)
    for batch in (0, 1):  # the read ahead has failed, but its turn has not come
        np.testing.assert_array_equal(source[batch], ROWS[order.indices(batch)])
    with pytest.raises(OSError, match="the disk is gone"):
        source[2]
    monkeypatch.setattr(activations, "take", take)
    for batch in (2, 0):
        np.testing.assert_array_equal(source[batch], ROWS[order.indices(batch)])


def test_what_is_left_of_a_read_that_failed_spoils_no_other(activations, monkeypatch):
    order = BatchOrder(96, 16, 0, 4, 4)  # a batch is a window
    first, take = np.sort(order.window(0, 0)), activations.take

    def late(indices, out):
        if indices[0] == first[0]:
            raise OSError("the disk is gone")
        time.sleep(0.1)
        return take(indices, out)

    monkeypatch.setattr(activations, "take", late)
    source = BatchSource(activations, order, 6)
    with pytest.raises(OSError, match="the disk is gone"):
        source[0]
    monkeypatch.setattr(activations, "take", take)
    source[5]  # the last: nothing is read ahead
    time.sleep(0.2)
    np.testing.assert_array_equal(source[5], ROWS[order.indices(5)])


def test_a_batch_that_processes_cannot_share_is_refused(activations):
    with pytest.raises(InputError, match="^batch_size is 10; expected a multiple of the 4 processes$"):
        BatchSource(activations, BatchOrder(97, 10, 0), 3, process_count=4)


# In sequence


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_batches_go_through_the_training_rows_for_ever(tmp_path, dtype):
    activations = write(tmp_path, dtype, holdout_rows=17)
    batches = list(itertools.islice(load_batches(activations, 16, seed=0), 20))  # 4 epochs of 80 rows
    assert {(batch.shape, batch.dtype) for batch in batches} == {((16, 3), np.dtype(dtype))}
    for epoch in range(4):
        rows = np.concatenate(batches[5 * epoch : 5 * epoch + 5])
        np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], ROWS[:80].astype(dtype))
    assert not np.array_equal(batches[0], batches[5])


def test_a_range_of_rows_to_draw_from(tmp_path):
    activations = write(tmp_path, holdout_rows=17)
    rows = np.concatenate(list(load_batches(activations, 17, seed=0, rows=(80, 97), stop=1)))
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], ROWS[80:])
    for bad in [(80, 98), (5, 5), (-1, 5), (9, 3)]:
        with pytest.raises(InputError, match=rf"^batches of rows {bad[0]} to {bad[1]} of a set with 97; give some"):
            load_batches(activations, 2, seed=0, rows=bad)


def test_a_batch_larger_than_the_training_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="^a batch has 81 rows but the set 80; "):
        load_batches(write(tmp_path, holdout_rows=17), 81, seed=0)


@pytest.mark.parametrize("start", [0, 1, 13, 29, 30])
def test_a_resumed_run_sees_the_batches_that_were_to_come(activations, start):
    whole = list(load_batches(activations, 8, seed=1, stop=30))
    resumed = list(load_batches(activations, 8, seed=1, start=start, stop=30))
    assert len(whole) == 30 and len(resumed) == 30 - start
    for one, other in zip(whole[start:], resumed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_differ(activations):
    one, other = (next(load_batches(activations, 64, seed)) for seed in (0, 1))
    assert np.mean(one == other) < 0.1


def test_processes_share_the_batches_of_one(activations):
    whole = load_batches(activations, 8, seed=0, stop=9)
    hosts = [load_batches(activations, 8, seed=0, stop=9, process_index=i, process_count=2) for i in (0, 1)]
    for batch, *parts in zip(whole, *hosts, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_an_error_while_reading_reaches_the_consumer(activations, monkeypatch):
    def broken(indices, out=None):
        raise OSError("the disk is gone")

    monkeypatch.setattr(activations, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(load_batches(activations, 8, seed=0))


# To the devices


def counted(stop: int, drawn: list[int]) -> Iterator[np.ndarray]:
    for number in range(stop):
        drawn.append(number)
        yield np.full((8, 2), number, np.float32)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch_to_device"]


@pytest.mark.parametrize("size", [1, 2, 50])
def test_batches_arrive_on_the_device_in_order(size):
    arrays = list(prefetch_to_device(counted(20, []), size=size))
    assert all(isinstance(array, jax.Array) for array in arrays)
    np.testing.assert_array_equal(np.stack(arrays)[:, 0, 0], np.arange(20))
    assert not threads()


def test_batches_are_split_over_the_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = [ROWS[:16], ROWS[16:32]]
    for batch, array in zip(batches, prefetch_to_device(iter(batches), sharding=sharding), strict=True):
        assert array.sharding.is_equivalent_to(sharding, 2)
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
        np.testing.assert_array_equal(array, batch)


def test_bfloat16_stays_bfloat16():
    (array,) = prefetch_to_device(iter([ROWS.astype(ml_dtypes.bfloat16)]))
    assert array.dtype == jax.numpy.bfloat16


def test_an_error_comes_in_its_turn():
    def failing():
        yield from counted(3, [])
        raise InputError("row 4 is damaged")

    arrays = prefetch_to_device(failing(), size=2)
    np.testing.assert_array_equal([int(next(arrays)[0, 0]) for _ in range(3)], [0, 1, 2])
    with pytest.raises(InputError, match="row 4 is damaged"):
        next(arrays)
    assert not threads()


def test_a_batch_that_does_not_fit_the_devices_is_an_error():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = prefetch_to_device(iter([ROWS[:9]]), sharding=NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match="should evenly divide the shape"):
        next(arrays)


def test_no_more_is_read_ahead_than_asked_for():
    drawn: list[int] = []
    arrays = prefetch_to_device(counted(10**9, drawn), size=3)
    assert drawn == []  # nothing before the first is asked for
    next(arrays)
    arrays.close()
    assert len(drawn) <= 6  # one consumed, three waiting, one in hand, one that took the consumed one's place


def test_closing_stops_the_thread():
    arrays = prefetch_to_device(counted(10**9, []), size=2)
    next(arrays)
    assert len(threads()) == 1
    arrays.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(arrays)


def test_leaving_a_loop_stops_the_thread():
    for _ in prefetch_to_device(counted(10**9, [])):
        break
    assert not threads()


def test_a_size_below_one_is_refused():
    with pytest.raises(InputError, match="^size is 0; expected at least 1$"):
        next(prefetch_to_device(iter([]), size=0))
