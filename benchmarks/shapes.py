"""The sizes that benchmarks and their tests share, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Rows of a batch, width of a row, concepts of the dictionary."""

    rows: int
    d: int
    concepts: int


SHAPES = {
    "demo": Shape(1024, 576, 4608),  # SmolLM2-135M's residual stream, 8 d: what `make demo` trains
    "text": Shape(1024, 768, 24576),  # GPT-2 small's, 32 d: the paper's largest text dictionary
    "vision": Shape(256, 768, 49152),  # CLIP ViT-B/16's, 64 d: the paper's vision dictionary
    "vision_32": Shape(32, 768, 49152),
    "wide": Shape(16, 768, 1048576),
    "tiny": Shape(8, 16, 192),  # for tests
}
