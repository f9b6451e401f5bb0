"""Measure, certify and predict what a LoRA adapter memorises word for word.

The names in `__all__` are loaded on first use:

    >>> import pml
    >>> round(float(pml.loss_reduction(4, 100, C=40, alpha=0.5, beta=0.5, b=1)), 9)    # nats per target token
    9.0

    runs = pml.read_runs(["runs/demo/law"])                        # records of runs, by folder
    law = pml.law_of_records(runs)                                 # the law with intervals, and a model of recall
    module, data = pml.open_run("runs/facts/version_0")            # a finished run: model, adapter and corpus
    certificates = pml.certify(module.model, data.corpus.examples) # pair by pair: certain, right or failing
    model = pml.load_adapter(model, "runs/facts/version_0/adapter")# any adapter, on a model loaded by transformers

These certificates hold in float32. With 16-bit weights use `pml certify`, which also measures rounding and allows for
it, or `measure_rounding` and `allow_for_rounding` of `pml.certificate`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml.adapter import AdapterConfig, load_adapter
    from pml.backbone import load_backbone
    from pml.certificate import certify
    from pml.encoding import PromptFormat, TextEncoder
    from pml.law import fit_law, law_of_records, loss_reduction, observations_from_records, read_csv, read_law
    from pml.memorizing import memorize
    from pml.modules import SFT, MemFT
    from pml.records import read_records as read_runs
    from pml.runs import open_run

__all__ = [
    "SFT",
    "AdapterConfig",
    "MemFT",
    "PromptFormat",
    "TextEncoder",
    "certify",
    "fit_law",
    "law_of_records",
    "load_adapter",
    "load_backbone",
    "loss_reduction",
    "memorize",
    "observations_from_records",
    "open_run",
    "read_csv",
    "read_law",
    "read_runs",
]

_WHERE = {
    "adapter": ("AdapterConfig", "load_adapter"),
    "backbone": ("load_backbone",),
    "certificate": ("certify",),
    "encoding": ("PromptFormat", "TextEncoder"),
    "law": ("fit_law", "law_of_records", "loss_reduction", "observations_from_records", "read_csv", "read_law"),
    "memorizing": ("memorize",),
    "modules": ("SFT", "MemFT"),
    "records": ("read_records",),
    "runs": ("open_run",),
}
_RENAMED = {"read_runs": "read_records"}


def __getattr__(name: str) -> Any:
    own = _RENAMED.get(name, name)
    for module, names in _WHERE.items():
        if own in names and name in __all__:
            return getattr(import_module(f"pml.{module}"), own)
    raise AttributeError(f"module 'pml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
