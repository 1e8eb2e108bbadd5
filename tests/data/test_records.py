"""TFDS datasets in array_record format, written and read without TensorFlow."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from jax_sae.data import BatchOrder, BatchSource, open_activations
from jax_sae.errors import InputError

LENGTHS = {"validation": 3, "train": 20}
Example = dict[str, np.ndarray | int]


def store(folder: Path, features: dict, example: Callable[[int], Example], lengths: dict[str, int]) -> Path:
    """Writes a dataset whose example number i of a split is ``example(i)``; returns its folder."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Activations of a tiny model."""

        name = "tiny"
        pkg_dir_path, code_path = epath.Path(folder), None  # this file is in no package
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {name: self._generate_examples(length) for name, length in lengths.items()}

        def _generate_examples(self, length: int):
            yield from ((i, example(i)) for i in range(length))

    builder = Tiny(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


def rows_of(items: np.ndarray) -> np.ndarray:
    return items.reshape(-1, items.shape[-1]).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    features = {"activation": tfds.features.Tensor(shape=(4,), dtype=np.float32), "label": np.int64}
    example = lambda i: {"activation": np.arange(4, dtype=np.float32) + 4 * i, "label": i}
    return store(tmp_path_factory.mktemp("vectors"), features, example, LENGTHS)


def test_the_train_split_is_read(dataset):
    activations = open_activations(dataset)
    assert (activations.rows, activations.d, activations.dtype.name) == (20, 4, "float32")
    assert activations.tokens_per_item is None
    rows = activations.read(0, 20)
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], rows_of(np.arange(80).reshape(20, 4)))
    assert activations.read(7, 7).shape == (0, 4)
    np.testing.assert_array_equal(activations.read(3, 11), rows[3:11])
    indices = np.array([5, 19, 0, 5])
    np.testing.assert_array_equal(activations.take(indices), rows[indices])
    assert activations.fingerprint == open_activations(dataset).fingerprint


def test_items_of_tokens_are_read_token_by_token(tmp_path):
    features = {"residual": tfds.features.Tensor(shape=(3, 4), dtype=np.float16)}
    example = lambda i: {"residual": (np.arange(12).reshape(3, 4) + 12 * i).astype(np.float16)}
    activations = open_activations(store(tmp_path, features, example, {"test": 5}))
    assert (activations.rows, activations.d, activations.dtype.name) == (15, 4, "float16")
    assert activations.tokens_per_item == 3
    rows = activations.read(0, 15)
    first = rows.reshape(5, 12)[:, 0]
    np.testing.assert_array_equal(rows[np.repeat(np.argsort(first) * 3, 3) + np.tile(range(3), 5)],
                                  np.arange(60).reshape(15, 4))  # fmt: skip
    np.testing.assert_array_equal(activations.read(4, 11), rows[4:11])
    np.testing.assert_array_equal(activations.take(np.array([1, 4, 13])), rows[[1, 4, 13]])


def test_batches_of_records(dataset):
    activations = open_activations(dataset)
    order = BatchOrder(20, 6, 0, block_rows=4, window_blocks=2)
    source = BatchSource(activations, order, 9)
    for batch in range(9):
        np.testing.assert_array_equal(source[batch], activations.read(0, 20)[order.indices(batch)])


def remove_records(folder: Path) -> None:
    next(folder.glob("*train*")).unlink()


def cut_records(folder: Path) -> None:
    record = next(folder.glob("*train*"))
    record.write_bytes(record.read_bytes()[:100])


def say_tfrecord(folder: Path) -> None:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "dataset_info.json").write_text("{"), "is not a TFDS dataset (Failed to load JSON"),
        (lambda folder: (folder / "features.json").unlink(), "is not a TFDS dataset (Cannot restore"),
        (say_tfrecord, "is in tfrecord format; prepare it with file_format='array_record'"),
        (remove_records, "is damaged (open() failed: No such file or directory"),
        (cut_records, "is damaged (ArrayRecord file should be at least 64KB big); prepare it again"),
    ],
)
def test_damaged_datasets_are_refused_in_one_line(dataset, tmp_path, damage, message):
    folder = shutil.copytree(dataset, tmp_path / "copy")
    damage(folder)
    with pytest.raises(InputError) as caught:
        open_activations(folder)
    found = str(caught.value)
    assert message in found and str(folder) in found and "\n" not in found


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"label": np.int64}, "has features label; expected one Tensor feature of shape [d] or [tokens, d]"),
        ({"a": tfds.features.Tensor(shape=(2,), dtype=np.float64)}, "feature a is float64 (2,), expected one shape of"),
        ({n: tfds.features.Tensor(shape=(2,), dtype=np.float32) for n in "ab"}, "has features a, b; expected one"),
        ({"a": tfds.features.Tensor(shape=(None, 2), dtype=np.float32)}, "feature a is float32 (None, 2), expected"),
    ],
)
def test_other_features_are_refused(tmp_path, features, message):
    example = lambda i: {
        name: i if feature is np.int64 else np.zeros([size or 1 for size in feature.shape], feature.np_dtype)
        for name, feature in features.items()
    }
    folder = store(tmp_path, features, example, {"train": 2})
    with pytest.raises(InputError) as caught:
        open_activations(folder)
    assert message in str(caught.value)
