"""A small activation set shared by the tests of the application."""

import numpy as np
import pytest

from tests.train.application import make_rows


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "rows.npy"
    np.save(path, make_rows())
    return path
