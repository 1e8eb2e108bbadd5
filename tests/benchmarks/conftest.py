"""Benchmarks leave the allocator of the test process alone."""

import pytest

from benchmarks import end_to_end, growth, sparsemax, train_step


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch):
    for benchmark in (end_to_end, growth, sparsemax, train_step):
        monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: True)
