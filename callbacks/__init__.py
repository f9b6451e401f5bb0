"""Callbacks, one per file: they decide when to measure a run and what to log."""

from callbacks._corpus_metric import CorpusMetricCallback
from callbacks.generalization import Generalization
from callbacks.harm import Harm
from callbacks.retention import Retention
from callbacks.run_record import RunRecord
from callbacks.stop_when_recalled import StopWhenRecalled
from callbacks.token_thresholds import TokenThresholds
from callbacks.verbatim_recall import VerbatimRecall
from pml.checkpoints import Checkpoints

__all__ = [
    "Checkpoints",
    "CorpusMetricCallback",
    "Generalization",
    "Harm",
    "Retention",
    "RunRecord",
    "StopWhenRecalled",
    "TokenThresholds",
    "VerbatimRecall",
]
