"""The training application. In a checkout ``python -m train``; from an installed package ``python -m jax_sae.train``."""
