"""Whether runs determine a form: enough of them, and different enough in size and length."""

import math
from collections.abc import Sequence

import numpy as np

from pml.law.forms import AdapterSize, Form
from pml.law.observations import Observation, saturated
from pml.law.schema import FACTORS, factors_of

__all__ = ["SMALLEST_SPREAD", "missing_for", "shortfall"]

SMALLEST_SPREAD = 1e-6
"""Smallest spread of the loss reduction, in nats, that float32 losses can show."""
# One more than the four parameters of the published law, so that the residuals inform about the noise.
FEWEST_RUNS = 5
# Two more than the two parameters of the law in bits.
FEWEST_RUNS_IN_BITS = 4


def missing_for(form: Form, runs: Sequence[Observation], adapter_size: AdapterSize, context: str) -> str | None:
    """Why runs cannot determine a form, because of what they do not say or as in `shortfall`; None where they can."""
    unknown = []
    if form.needs_entropy and any(run.entropy_bits is None for run in runs):
        unknown.append("the information in their corpus")
    if form.proportional and any(run.effective_parameters is None for run in runs):
        unknown.append("the number of their effective parameters")
    if unknown:
        return (
            f"form {form.name}: of some runs {' and '.join(unknown)} is unknown; leave them out, or choose another form"
        )
    return shortfall(form, runs, adapter_size, context)


def shortfall(form: Form, runs: Sequence[Observation], adapter_size: AdapterSize, context: str = "") -> str | None:
    """Why runs are too few or too alike to determine a form, and what to do; None where they are not.

    Args:
        form: The form.
        runs: The runs.
        adapter_size: What the law counts.
        context: How many runs there are and why others are left out.
    """
    used = [run for run in runs if not saturated(run)]
    fewest = FEWEST_RUNS_IN_BITS if form.proportional else FEWEST_RUNS
    if len(used) < fewest:
        return (
            f"{len(used)} {context} can be used; saturated means a final loss <= ln 2: expected at least {fewest}; "
            "add runs with longer targets or lower ranks"
        )
    reductions = [run.loss_reduction for run in used]
    if max(reductions) - min(reductions) < SMALLEST_SPREAD:
        return (
            f"the loss reduction is {reductions[0]:.6g} nats in all {len(used)} runs: expected it to vary with rank "
            "and length; check that the runs really differ"
        )
    if form.proportional:
        return None
    grid = {(run.size(adapter_size), run.target_tokens) for run in used}
    size, length = (FACTORS[factor] for factor in factors_of(adapter_size))
    for noun, values in ((size, {point[0] for point in grid}), (length, {point[1] for point in grid})):
        if len(values) < 2:
            return (
                f"only {noun} {min(values)} among the {len(used)} {context} that can be used: expected at least 2 "
                f"{noun}s; add runs with other {noun}s"
            )
    logs = np.array([[1.0, math.log(s), math.log(tokens)] for s, tokens in grid])
    if len(grid) < 4 or np.linalg.matrix_rank(logs, tol=1e-9 * len(grid)) < 3:
        return (
            f"the {len(grid)} ({size}, length) pairs of the {len(used)} {context} that can be used cannot separate the "
            f"effect of {size} from that of length: expected at least 4 different pairs, not all on one line; add runs "
            f"that change the {size} at the same length"
        )
    return None
