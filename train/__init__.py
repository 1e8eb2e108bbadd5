"""The training application: ``python -m train`` in a checkout, ``python -m jax_sae.train`` once installed."""
