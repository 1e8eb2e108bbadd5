"""``golden``: every file of the case that a test names with ``@pytest.mark.golden(case)``."""

from pathlib import Path

import pytest

from tests.conformance.golden import Golden, files_of

OURS = Path(__file__).parent.parent / "goldens"


def goldens_folder(config):
    return Path(config.getoption("--goldens") or OURS)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is not None and "golden" in metafunc.fixturenames:
        (case,) = marker.args
        paths = files_of(case, goldens_folder(metafunc.config)) or [f"no file {case}_*.npz"]
        metafunc.parametrize("golden", paths, indirect=True, ids=lambda path: getattr(path, "stem", path))


@pytest.fixture
def golden(request):
    if isinstance(request.param, str):
        pytest.fail(f"{request.param} in {goldens_folder(request.config)}")
    return Golden(request.param)


@pytest.fixture
def goldens(request):
    """The folder of golden files."""
    return goldens_folder(request.config)
