"""Benchmarks leave the allocator of the test process alone."""

import pytest

from benchmarks import bottleneck, torch_steps


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch):
    for benchmark in (bottleneck, torch_steps):
        monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: True)
