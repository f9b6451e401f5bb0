"""Laws side by side: how exponents and bits per parameter change with budget, learning rate, placement or method."""

import math
from collections.abc import Mapping

from pml.law import FORMS, Equation, Estimate, FormName, LawFit, unconverged
from pml.law.tables import SYMBOLS
from pml.report.parts import Section
from pml.tables import TextTable, show_interval

__all__ = ["common_form", "side_by_side"]


def common_form(laws: Mapping[str, LawFit]) -> FormName | None:
    """The form to compare laws in: of the forms with exponents that all laws determine, the one of smallest AICc.

    AICc adds up over laws, since they are fitted to different runs. If every such form lacks it for some law, which has
    too few grid points, the simplest is taken. Without such a form: `stored_bits` if all laws have it, otherwise None.
    """
    fits = [{fit.form: fit for fit in law.fits if fit.determined} for law in laws.values()]
    shared = [name for name, form in FORMS.items() if not form.proportional and all(name in found for found in fits)]

    def criterion(name: FormName) -> tuple[float, int]:
        total = sum(math.inf if (value := found[name].aicc) is None else value for found in fits)
        return total, len(FORMS[name].fitted)

    of_bits: FormName | None = "stored_bits" if all("stored_bits" in found for found in fits) else None
    return min(shared, key=criterion, default=of_bits)


def side_by_side(laws: Mapping[str, LawFit]) -> Section | None:
    """Parameters of laws, given by name, in one form; None with fewer than two laws or without a common form."""
    if len(laws) < 2 or (form := common_form(laws)) is None:
        return None
    names = [name for name in ("alpha", "beta") if name in FORMS[form].fitted]
    kappa, text = SYMBOLS["bits_per_parameter"], FORMS[form].text
    for name in names:
        text = text.replace(name, SYMBOLS[name])
    if FORMS[form].proportional:
        why = "No form with exponents is determined by the runs of all laws."
    elif any(law.fit_of(form).aicc is None for law in laws.values()):
        why = "It is the simplest form with exponents that all can determine; some have too few grid points for AICc."
    else:
        why = "Of the forms with exponents that all can determine, it has the smallest total AICc."
    rows = []
    for label, law in laws.items():
        fit, bits = law.fit_of(form), law.bits_per_parameter
        rows.append(
            [
                label,
                *(_with_interval(fit.parameters[name]) for name in names),
                "-" if bits is None else _with_interval(bits),
                f"{fit.r2:.4f}",
                law.form,
                f"{len(law.observations):,}",
                f"{sum(map(unconverged, law.observations)):,}",
            ]
        )
    columns = (*(SYMBOLS[name] for name in names), kappa)
    note = (
        f"All in one form, {form}, so that numbers can be compared. {why} dL: loss reduction in nats per target token; "
        f"s: LoRA rank, or effective parameters where the law counts them; l: target tokens; {kappa.split()[0]}: "
        "stored bits per adapter parameter."
    )
    table = TextTable(
        "Parameters of the laws",
        ("law", *(f"{name} (95 %)" for name in columns), "R²", "form chosen for it", "runs", "not converged"),
        rows,
        words=(0, len(names) + 3),
        note="In brackets 95 % intervals. Not converged: unsaturated runs with more than a hundredth of their loss "
        "reduction in the last tenth of the steps.",
    )
    return Section("Laws side by side", equation=Equation(text), sentences=[note], tables=[table])


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ({show_interval(estimate.interval)})"
