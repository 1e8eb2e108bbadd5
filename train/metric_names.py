"""The numbers of ``evaluation.json``: what each is called in tables, what it means, which way is better."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from .report_text import percent, significant


def _plain(value: float) -> str:
    return significant(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return percent(value, 3)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of ``evaluation.json``.

    Attributes:
      name: its key.
      title: in tables.
      meaning: one line.
      better: which way is better, for autoencoders with equally many active concepts; None where neither is.
      show: its text.
    """

    name: str
    title: str
    meaning: str
    better: Literal["lower", "higher"] | None = None
    show: Callable[[float], str] = _plain


METRICS = (
    Metric("active", "Active concepts", "concepts that are not zero, mean per input"),
    Metric("l0", "L0", "fraction of the concepts that are exactly zero, mean over inputs", show=lambda v: f"{v:.4f}"),
    Metric("fvu", "FVU", "variance left unexplained, per input over its features, mean over inputs", "lower"),
    Metric("fvu_pooled", "FVU pooled", "squared error over all inputs against that of the mean", "lower"),
    Metric("nmse", "NMSE", "mean squared error of inputs that were standardised one by one", "lower"),
    Metric("cs", "CS", "cosine similarity of input and reconstruction", "higher"),
    Metric(
        "cknna", "CKNNA", "whether the nearest inputs, by scalar product, are the nearest by concepts too", "higher"
    ),
    Metric(
        "cknna_rows",
        "Inputs of a CKNNA batch",
        "neighbours are looked for among them; a rest takes no part",
        show=_count,
    ),
    Metric("do", "DO", "overlap of decoder rows at norm 1: mean squared cosine of two of them", "lower"),
    Metric("do_raw", "DO raw", "the same of the decoder rows as they are"),
    Metric("ms_mean", "MEAN-MS", "monosemanticity: how alike the items are that a concept fires on, mean", "higher"),
    Metric("ms_max", "MAX-MS", "the same of the best concept", "higher"),
    Metric(
        "ms_concepts",
        "Concepts with an MS",
        "those that differ from their smallest value on two held-out items or more",
        show=_count,
    ),
    Metric("ms_items", "Items of MS", "held-out items, whole ones", show=_count),
    Metric("ndn", "NDN", "concepts that never fire on the held-out inputs", "lower", _count),
    Metric("dead_fraction", "Dead", "the same as a fraction of the dictionary", "lower", percent),
    Metric("loss", "Loss", "what training minimises, on held-out inputs"),
    Metric("ce_clean", "CE clean", "cross-entropy of the language model as it is, nats per token", show=_nats),
    Metric("ce_sae", "CE with SAE", "with the reconstruction in place of the activations", "lower", _nats),
    Metric("ce_mean_ablated", "CE mean-ablated", "with the mean of the data in their place", show=_nats),
    Metric("ce_zero_ablated", "CE zero-ablated", "with zeros in their place", show=_nats),
    Metric(
        "ce_degradation",
        "CE degradation",
        "rise of the cross-entropy by the reconstruction: CE with SAE - CE clean",
        "lower",
    ),
    Metric("loss_recovered", "Loss recovered", "share of what zero ablation destroys", "higher", _share),
    Metric("loss_recovered_mean", "Loss recovered (mean)", "share of what mean ablation destroys", "higher", _share),
)
BY_NAME = {metric.name: metric for metric in METRICS}
MS_EMBEDDING = (
    "MS compares the items of a concept by an embedding. With no image encoder at hand it is the source model's own: "
    "the mean of the activations of an item's tokens, minus the mean of the training data."
)
