"""The Parametric Memory Law: by how much a LoRA adapter of a given size lowers the loss on a given number of tokens.

    dL(r, l) = C r^alpha l^(-beta) + b                                                     (Eq. 6)

dL is the loss reduction in nats per target token, r the LoRA rank, l the number of target tokens to memorise, summed
over the corpus. `forms` has this law and those that know its ceiling, `cells` what a run says about it, `content` the
file that a fit leaves, `fitting` how it is fitted, `uncertainty` how far it can be trusted, `findings` what to say of
it in words.
"""

from pml.law.cells import (
    CRITICAL_LOSS,
    Cell,
    LeftOutCell,
    Reason,
    cells_from_records,
    saturated,
    select_records,
    shared_setting,
    unconverged,
)
from pml.law.content import (
    FACTORS,
    LAW_NAME,
    Estimate,
    Factor,
    FormFit,
    HeldOut,
    LawCell,
    LawFit,
    Misfit,
    Prediction,
    RunDraws,
    percentiles,
    read_law,
)
from pml.law.fitting import fit_law
from pml.law.forms import FORMS, CapacityName, Form, FormName

__all__ = [
    "CRITICAL_LOSS",
    "FACTORS",
    "FORMS",
    "LAW_NAME",
    "CapacityName",
    "Cell",
    "Estimate",
    "Factor",
    "Form",
    "FormFit",
    "FormName",
    "HeldOut",
    "LawCell",
    "LawFit",
    "LeftOutCell",
    "Misfit",
    "Prediction",
    "Reason",
    "RunDraws",
    "cells_from_records",
    "fit_law",
    "percentiles",
    "read_law",
    "saturated",
    "select_records",
    "shared_setting",
    "unconverged",
]
