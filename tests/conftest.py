"""Strict JAX settings for every test: eight CPU devices, no implicit rank promotion."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--goldens", metavar="DIR", help="folder of golden files for tests/conformance; tests/goldens")
