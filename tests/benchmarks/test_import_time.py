"""The import benchmark's interpreters; nothing here depends on how fast they are."""

import subprocess

import pytest

from benchmarks.import_time import import_seconds


def test_only_the_import_is_timed_and_not_what_runs_before_it():
    assert 0 < import_seconds("import json", after="import time; time.sleep(0.5)") < 0.5


def test_an_import_that_fails_is_not_a_time():
    with pytest.raises(subprocess.CalledProcessError):
        import_seconds("import no_such_module_anywhere")
