"""What to say of a fitted law in words: why its numbers should be believed less than they look."""

from pml.law.cells import saturated, unconverged
from pml.law.content import FACTORS, FormFit, LawFit
from pml.law.forms import FORMS
from pml.law.texts import FEWEST_TEXTS
from pml.law.uncertainty import SPARE_TEXTS, texts_to_spare

__all__ = ["warnings_of"]

# Below this many cells the standard errors themselves are guesses: they rest on fewer than four degrees of freedom.
FEW_CELLS = 8
STRONG_CORRELATION = 0.98
LARGE_MAPE_PERCENT = 10.0
SMALL_R2 = 0.9
# Exponents measured so far are between 0.4 and 1.1; at 5, doubling the rank would multiply the reduction by 32.
STEEP_EXPONENT = 5.0


def warnings_of(law: LawFit) -> list[str]:
    """Why the chosen form should be believed less than its R2 suggests, most serious first."""
    fit = law.best
    return [
        *_of_the_solution(fit, sum(not saturated(cell) for cell in law.cells)),
        *_of_the_parameters(fit),
        *_of_the_grid(law),
        *_of_the_agreement(fit),
        *_of_the_runs(law),
    ]


def _of_the_solution(fit: FormFit, unsaturated: int) -> list[str]:
    found = []
    if not fit.determined:
        found.append(
            "C and b are not determined: dL = p + q ln r - s ln l, the limit of the law for alpha and beta near 0, "
            "describes the cells as well; add smaller ranks and longer targets before reading the parameters"
        )
    elif not fit.converged or fit.correlation is None:
        found.append("the fit did not settle on one solution, so there are no trustworthy standard errors; add cells")
    if unsaturated < FEW_CELLS:
        found.append(
            f"only {unsaturated} unsaturated cells for {len(fit.free)} parameters: the intervals are themselves "
            f"uncertain; {FEW_CELLS} or more are better"
        )
    return found


def _of_the_parameters(fit: FormFit) -> list[str]:
    found = []
    if fit.correlation is not None and "b" in fit.free:
        row = fit.correlation[fit.free.index("b")]
        strong = [
            f"{name} {value:+.3f}"
            for name, value in zip(fit.free, row, strict=True)
            if name in ("C", "alpha", "beta") and abs(value) > STRONG_CORRELATION
        ]
        if strong:
            found.append(
                f"b trades off against other parameters (correlation with {', '.join(strong)}): other values fit "
                "almost as well, so trust predictions inside the measured range more than the parameters"
            )
    for name in fit.free:
        value, stderr = fit.parameters[name].value, fit.parameters[name].stderr
        if stderr is not None and stderr > abs(value):
            found.append(
                f"{name} is not determined: its standard error ({stderr:.2g}) is larger than its value ({value:.2g})"
            )
    meanings = {"alpha": "falls as the rank rises", "beta": "rises with the length"}
    for name in meanings.keys() & fit.parameters.keys() if fit.determined else ():
        if fit.parameters[name].value <= 0:
            found.append(
                f"{name} is not positive: the fitted loss reduction {meanings[name]}, which the law does not mean; "
                "the larger cells may not have trained long enough"
            )
        if abs(fit.parameters[name].value) > STEEP_EXPONENT:
            found.append(
                f"{name} is {fit.parameters[name].value:.3g}: the loss reduction jumps between two ranks or lengths "
                "rather than following a power; look at those runs"
            )
    return found


def _of_the_grid(law: LawFit) -> list[str]:
    found = []
    used = [cell for cell in law.cells if not saturated(cell)]
    for factor in law.factors:
        values, noun = {getattr(cell, factor) for cell in used}, FACTORS[factor]
        if len(values) == 1:
            found.append(f"only one {noun}: how the loss reduction depends on it was not measured")
        elif len(values) == 2:
            found.append(f"only 2 {noun}s: how the law bends between them cannot be checked")
    fitted = len(law.best.free)
    if texts_to_spare(used, fitted) < SPARE_TEXTS:
        number = len({cell.text_label for cell in used})
        unknown = (
            ", nor for how texts of one length differ (tell pml plan the frozen model's loss, --initial-loss)"
            if len({cell.text_label for cell in law.cells}) < FEWEST_TEXTS
            else ""
        )
        found.append(
            f"only {number} text{'s' if number > 1 else ''} for {fitted} parameters: what is peculiar to a text cannot "
            f"be told from an effect of its length, and intervals do not allow for it{unknown}"
        )
    corpora = law.setting.get("corpus", [])
    if len(corpora) > 1:
        found.append(
            f"the runs are of different corpora ({', '.join(corpora)}): a law belongs to one kind of text, "
            "keep one of them (--where.corpus NAME) unless they are"
        )
    pooled = law.setting.get("pooled", {})
    if pooled:
        names = "; ".join(f"{name} ({', '.join(map(str, values))})" for name, values in pooled.items())
        found.append(
            f"the runs differ in more than rank, length and seed: {names}; one law for them may mean nothing, so keep "
            f"one value (--where.{next(iter(pooled))} VALUE) unless each was chosen for its size"
        )
    return found


def _of_the_agreement(fit: FormFit) -> list[str]:
    found = []
    if fit.r2 < SMALL_R2 and not FORMS[fit.form].proportional:
        found.append(
            f"the law explains only part of how the loss reduction varies (R2 {fit.r2:.2f}): it may not hold here, or "
            "the runs differ in more than rank and length"
        )
    if fit.mape_percent > LARGE_MAPE_PERCENT:
        found.append(
            f"the law misses the measured loss reduction by {fit.mape_percent:.1f} % on average: it may not hold here, "
            "or some runs had not converged"
        )
    for misfit in fit.misfits:
        noun = FACTORS[misfit.factor]
        side = "more" if misfit.excess_percent > 0 else "less"
        found.append(
            f"at {noun} {misfit.value} runs reach {abs(misfit.excess_percent):.1f} % {side} than the form says "
            f"({misfit.cells} cells, beyond their scatter): it does not hold there"
        )
    return found


def _of_the_runs(law: LawFit) -> list[str]:
    """Runs that were still improving when they ended."""
    moving = [cell for cell in law.cells if unconverged(cell)]
    if not moving:
        return []
    drops = [cell.late_loss_drop for cell in moving if cell.late_loss_drop is not None]
    return [
        f"{len(moving)} of {sum(not saturated(cell) for cell in law.cells)} unsaturated cells had not converged: their "
        f"training loss still fell by up to {max(drops):.2g} nats over the last tenth of the steps; the law is one of "
        "this budget, so train longer before comparing it with another"
    ]
