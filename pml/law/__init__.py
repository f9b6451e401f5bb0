"""The Parametric Memory Law: how far a LoRA adapter of a given size reduces the loss on a given number of tokens.

    dL(r, l) = C r^alpha l^(-beta) + b                                                     (Eq. 6)

dL is the loss reduction in nats per target token, r the LoRA rank, and l the number of target tokens to memorise,
summed over the corpus. Read in this order:

    forms          the law as one function, and its forms as `lmfit.Parameters` on it
    observations   what a run measured, and which runs a law can use; `csv_file` reads measurements from elsewhere
    data           runs as arrays, and the weights of their residuals
    least_squares  the lmfit fit of one form, and batched fits for the bootstrap
    intervals      noise, standard errors, profile likelihood, wild bootstrap; `texts`: how texts differ
    selection      whether the runs determine a form; the choice by AICc and held-out prediction
    fit            `fit_law`, which combines these
    prediction     predictions: the mean, by bootstrapped laws, and for new runs
    law_fit        `LawFit`, the content of `law.json` (`schema`, `equation`), and its predictions
    diagnostics    warnings; `tables`: what the commands and the report show
"""

from pml.groups import shared_setting
from pml.law.csv_file import read_csv
from pml.law.equation import Equation
from pml.law.fit import fit_law, law_of_records
from pml.law.forms import FORMS, FormName, loss_reduction
from pml.law.law_fit import LAW_NAME, LawFit, read_law
from pml.law.observations import (
    CRITICAL_LOSS,
    LeftOutRun,
    Observation,
    observations_from_records,
    saturated,
    unconverged,
)
from pml.law.schema import Estimate, FormFit, HeldOut, RunDraws, percentiles
from pml.law.texts import MAX_LOSS_DEVIATION

__all__ = [
    "CRITICAL_LOSS",
    "FORMS",
    "LAW_NAME",
    "MAX_LOSS_DEVIATION",
    "Equation",
    "Estimate",
    "FormFit",
    "FormName",
    "HeldOut",
    "LawFit",
    "LeftOutRun",
    "Observation",
    "RunDraws",
    "fit_law",
    "law_of_records",
    "loss_reduction",
    "observations_from_records",
    "percentiles",
    "read_csv",
    "read_law",
    "saturated",
    "shared_setting",
    "unconverged",
]
