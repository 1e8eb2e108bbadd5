"""Language models whose activations are read and spliced, in Flax NNX, checked against the originals."""
