"""Benchmarks that anyone can rerun: ``python -m benchmarks.<name>`` prints a table and writes its JSON."""
