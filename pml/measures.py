"""Measures of a record: pure functions of a corpus' scores before and after the fit."""

from typing import Any

from pml import metrics
from pml.corpus import Corpus
from pml.token_results import replaced_tokens
from pml.token_scores import TokenScores

__all__ = ["CERTAIN", "memorized_bits", "recall_measures", "validation_point"]

CERTAIN = 0.5
"""Probability above which a token is certain: no other can have a higher one."""


def recall_measures(
    corpus: Corpus,
    initial: TokenScores,
    final: TokenScores,
    parameters: int,
    samples: int = 100,
) -> dict[str, Any]:
    """Results of a run, as fields of the record.

    Args:
        corpus: The memorised corpus.
        initial: Its scores under the frozen model.
        final: Its scores under the adapted model.
        parameters: Effective parameters of the adapter.
        samples: Number of samples at temperature 1 for `extraction_probability`.
    """
    initial_loss, final_loss = metrics.mean_loss(initial).item(), metrics.mean_loss(final).item()
    bits = memorized_bits(corpus, final)
    return {
        "initial_loss": initial_loss,
        "final_loss": final_loss,
        "loss_reduction": initial_loss - final_loss,
        **_recall(final, CERTAIN),
        "by_kind": metrics.by_kind(replaced_tokens(corpus.examples, final), initial, final),
        "extraction_probability": metrics.extraction_probability(final, samples).mean().item(),
        "extraction_samples": samples,
        "memorized_bits": bits,
        "bits_per_parameter": bits / parameters if bits is not None else None,
    }


def memorized_bits(corpus: Corpus, scores: TokenScores) -> float | None:
    """See `pml.metrics.memorized_bits`; facts asked for several times count once; None if the entropy is unknown."""
    if corpus.entropy_bits is None:
        return None
    if corpus.fact_ids is None:
        loss = metrics.mean_loss(scores).item()
    else:
        loss = metrics.facts_loss(scores, corpus.fact_ids).item() / corpus.target_tokens
    return metrics.memorized_bits(corpus.entropy_bits, loss, corpus.target_tokens)


def validation_point(scores: TokenScores, threshold: float = CERTAIN, wall_seconds: float = 0.0) -> dict[str, float]:
    """First or last point of the validation curves, by tag, and the wall time in seconds."""
    measures = {"loss": metrics.mean_loss(scores).item(), **_recall(scores, threshold)}
    return {**{f"val/{name}": value for name, value in measures.items()}, "run/wall_seconds": wall_seconds}


def _recall(scores: TokenScores, threshold: float) -> dict[str, float]:
    return {
        "token_accuracy": metrics.token_accuracy(scores).item(),
        "exact_match": metrics.exact_match(scores).double().mean().item(),
        "sub_threshold_fraction": metrics.sub_threshold_fraction(scores, threshold).item(),
        "min_target_probability": metrics.min_target_probability(scores).item(),
        "first_failure": metrics.first_failure(scores).double().mean().item(),
    }
