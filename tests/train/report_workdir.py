"""A workdir with everything that the report reads, small and with known numbers."""

import json
from pathlib import Path

CONFIG = {
    "preset": "sparsemax",
    "data": "runs/demo/activations",
    "steps": 100,
    "batch_size": 32,
    "clip_norm": None,
    "sae": {"d_in": 16, "n_concepts": 64, "activation": "sparsemax", "k": 32},
    "source": {"model": "SmolLM2", "layer": 9, "text": {"name": "speeches"}},
}
EVALUATION = {
    "loss": 2.0,
    "l0": 0.7,
    "active": 18.25,
    "fvu": 0.0761,
    "fvu_pooled": 0.1063,
    "cs": 0.9612,
    "dead_fraction": 0.25,
    "rows": 1000,
    "ce_clean": 3.48,
    "ce_sae": 3.616,
    "ce_mean_ablated": 9.198,
    "ce_zero_ablated": 10.803,
    "ce_degradation": 0.136,
    "loss_recovered": 0.98143,
    "loss_recovered_mean": 0.97622,
}


def context(tokens, values, peak, **changes):
    return {"source": "1862-Lincoln", "row": 7, "tokens": tokens, "values": values, "peak": peak} | changes


def concept(number, **changes):
    contexts = [context([" the", " peace", " of", "\n"], [0.0, 4.0, 1.0, 0.0], 1, row=row) for row in range(5)]
    strengths = {"frequency": 0.0042, "mean_activation": 1.5, "max_activation": 4.0}
    return {"id": number, "contexts": contexts, **strengths} | changes


def concepts(**changes):
    return {
        "rows": 1000,
        "n_concepts": 64,
        "active_histogram": {"edges": [0, 1, 2, 3, 4, 5], "counts": [0, 100, 500, 350, 50]},
        "frequency_histogram": {"log10_edges": [-3.0, -2.0, -1.0, 0.0], "counts": [24, 16, 8], "never": 16},
        "few": [context(["Mr", "."], [None, 1.0], 1)],
        "many": [context([" a", " war"], [2.0, 4.0], 1)],
        "concepts": [concept(3), concept(41)],
    } | changes


def records(steps=(20, 40, 60, 80, 100), **changes):
    """Lines of metrics.jsonl: training records, and a validation after the last."""
    lines = [
        {
            "step": step,
            "rows": step * 32,
            "loss": 1000 / step,
            "l0": 0.7,
            "active": 18.0,
            "fvu": 10 / step,
            "dead_fraction": 0.25,
            "learning_rate": 1e-3,
            "rows_per_second": 320.0,
            "input_wait_fraction": 0.01,
            "elapsed_seconds": step / 10,
        }
        | changes
        for step in steps
    ]
    return [*lines, {"step": steps[-1], "val_loss": 12.0, "val_fvu": 0.125, "val_active": 17.5}]


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_workdir(path: Path, **files) -> Path:
    """A workdir of the numbers above; a file given as None is left out, given as text is written as it is."""
    path.mkdir(parents=True, exist_ok=True)
    contents = {
        "config": CONFIG,
        "metrics": jsonl(records()),
        "evaluation": EVALUATION,
        "concepts": concepts(),
    }
    for name, content in (contents | files).items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (path / (f"{name}.jsonl" if name == "metrics" else f"{name}.json")).write_text(text)
    return path
