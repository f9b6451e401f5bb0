"""Warnings: reasons to trust a fitted law less than its numbers suggest."""

from pml.law.forms import FORMS
from pml.law.intervals import SPARE_TEXTS, texts_to_spare
from pml.law.law_fit import LawFit
from pml.law.observations import saturated, unconverged
from pml.law.schema import FACTORS
from pml.law.texts import FEWEST_TEXTS

__all__ = ["warnings_of"]

# With fewer runs the standard errors are themselves guesses: they rest on fewer than four degrees of freedom.
FEW_RUNS = 8
STRONG_CORRELATION = 0.98
LARGE_MAPE_PERCENT = 10.0
SMALL_R2 = 0.9
# Converged runs give exponents between 0.4 and 1.1. At 5, doubling the rank would multiply the reduction by 32.
STEEP_EXPONENT = 5.0


def warnings_of(law: LawFit) -> list[str]:
    """Reasons to trust the chosen form less than its R2 suggests, the most serious first."""
    return [*_about_parameters(law), *_about_the_grid(law), *_about_the_fit(law)]


def _about_parameters(law: LawFit) -> list[str]:
    fit, found = law.best, []
    if not fit.determined:
        found.append(
            "C and b are not determined: dL = a0 + a1 ln r - a2 ln l, the limit of the law for alpha and beta near 0, "
            "describes the runs as well; add smaller ranks and longer targets before reading the parameters"
        )
    elif not fit.converged or fit.correlation is None:
        found.append("the fit did not converge to one solution, so it has no reliable standard errors; add runs")
    unsaturated = sum(not saturated(run) for run in law.observations)
    if unsaturated < FEW_RUNS:
        found.append(
            f"only {unsaturated} unsaturated runs for {len(fit.free)} parameters: the intervals are themselves "
            f"uncertain; measure {FEW_RUNS} or more"
        )
    if fit.correlation is not None and "b" in fit.free:
        row = dict(zip(fit.free, fit.correlation[fit.free.index("b")], strict=True))
        strong = [f"{name} {row[name]:+.3f}" for name in ("C", "alpha", "beta") if abs(row[name]) > STRONG_CORRELATION]
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
    for name, effect in (("alpha", "falls as the rank rises"), ("beta", "rises with the length")):
        if name not in fit.parameters or not fit.determined:
            continue
        value = fit.parameters[name].value
        if value <= 0:
            found.append(
                f"{name} is not positive: the fitted loss reduction {effect}, which contradicts the law; "
                "the larger runs may need longer training"
            )
        if abs(value) > STEEP_EXPONENT:
            found.append(
                f"{name} is {value:.3g}: the loss reduction jumps between two ranks or lengths instead of following a "
                "power law; check those runs"
            )
    return found


def _about_the_grid(law: LawFit) -> list[str]:
    found = []
    used = [run for run in law.observations if not saturated(run)]
    for factor in law.factors:
        values, noun = {getattr(run, factor) for run in used}, FACTORS[factor]
        if len(values) == 1:
            found.append(f"only one {noun}: how the loss reduction depends on it is not measured")
        elif len(values) == 2:
            found.append(f"only 2 {noun}s: the curvature of the law between them cannot be checked")
    nvarys = len(law.best.free)
    if texts_to_spare(used, nvarys) < SPARE_TEXTS:
        number = len({run.text_label for run in used})
        unknown = (
            "; nor can they show how texts of one length differ (give pml plan the frozen model's loss, --initial_loss)"
            if len({run.text_label for run in law.observations}) < FEWEST_TEXTS
            else ""
        )
        found.append(
            f"only {number} text{'s' if number > 1 else ''} for {nvarys} parameters: the effect of a text cannot be "
            f"separated from that of its length, and the intervals do not allow for it{unknown}"
        )
    texts = {run.text_label for run in law.observations}
    drawn = {run.drawn_as for run in law.observations}
    if law.best.text_effect != 0 and None not in drawn and len(drawn) < len(texts):
        s = "s" if len(drawn) > 1 else ""
        found.append(
            f"the {len(texts)} texts come from {len(drawn)} seed{s} or source{s}, so longer ones begin with "
            "shorter ones, and intervals that allow for a new text are too narrow; give pml plan the frozen model's "
            "loss (--initial_loss)"
        )
    corpora = law.setting.get("corpus", [])
    if len(corpora) > 1:
        found.append(
            f"the runs used different corpora ({', '.join(corpora)}): a law describes one kind of text, so keep one "
            "corpus (--where.corpus NAME) unless all are of one kind"
        )
    pooled = law.setting.get("pooled", {})
    if pooled:
        names = "; ".join(f"{name} ({', '.join(map(str, values))})" for name, values in pooled.items())
        found.append(
            f"the runs differ in more than rank, length and seed: {names}; one law for all may be meaningless, so keep "
            f"one value (--where.{next(iter(pooled))} VALUE) unless each value was tuned for its rank and length"
        )
    return found


def _about_the_fit(law: LawFit) -> list[str]:
    """Warnings about the errors of the fit, and about runs that were still improving when they ended."""
    found = []
    r2, mape_percent, runs = law.unsaturated_fit
    which = f" over the {runs} unsaturated runs" if runs < law.best.observations_used else ""
    if r2 < SMALL_R2 and not FORMS[law.form].proportional:
        found.append(
            f"the law explains only part of the variation of the loss reduction (R2 {r2:.2f}{which}): it may not hold "
            "here, or the runs differ in more than rank and length"
        )
    if mape_percent > LARGE_MAPE_PERCENT:
        found.append(
            f"the law misses the measured loss reduction by {mape_percent:.1f} % on average{which}: it may not hold "
            "here, or some runs had not converged"
        )
    drops = [run.late_loss_drop or 0.0 for run in law.observations if unconverged(run)]
    if drops:
        found.append(
            f"{len(drops)} of {sum(not saturated(run) for run in law.observations)} unsaturated runs had not "
            f"converged: their training loss still fell by up to {max(drops):.2g} nats over the last tenth of the "
            "steps; the law holds for this budget only; train longer before comparing it with another law"
        )
    return found
