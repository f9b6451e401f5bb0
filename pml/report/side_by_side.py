"""Laws side by side: how exponents and bits per parameter change with budget, learning rate, placement or method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pml.figures import side_by_side_figure
from pml.law import FORMS, Estimate, FormFit, FormName, LawFit, unconverged
from pml.law.tables import SYMBOLS
from pml.report.parts import Panel, draw
from pml.tables import TextTable, show_interval

__all__ = ["SideBySide", "common_form", "side_by_side"]


@dataclass(frozen=True)
class SideBySide:
    """What a page says about several laws at once.

    Attributes:
        note: In which form they are compared, and why.
        panel: Their parameters with intervals.
        table: The same in numbers.
    """

    note: str
    panel: Panel
    table: TextTable


def common_form(laws: Mapping[str, LawFit]) -> FormName | None:
    """The form in which laws are best compared: of those whose exponents all laws determine, with the smallest AICc.

    The laws are of different runs, so their criteria add up; if some law has too few grid points for one, the simplest
    is taken. Where there is no such form, it is the one of bits per parameter if all have that, and None otherwise.
    """
    fits = [{fit.form: fit for fit in law.fits if fit.determined} for law in laws.values()]
    shared = [name for name, form in FORMS.items() if not form.proportional and all(name in found for found in fits)]

    def criterion(name: FormName) -> tuple[float, int]:
        total = sum(math.inf if (value := found[name].aicc) is None else value for found in fits)
        return total, len(FORMS[name].fitted)

    of_bits: FormName | None = "stored_bits" if all("stored_bits" in found for found in fits) else None
    return min(shared, key=criterion, default=of_bits)


def side_by_side(laws: Mapping[str, LawFit]) -> SideBySide | None:
    """Compare laws by what they are called; None where there are fewer than two, or they have no form in common."""
    if len(laws) < 2 or (form := common_form(laws)) is None:
        return None
    fits = {label: law.fit_of(form) for label, law in laws.items()}
    names = [name for name in ("alpha", "beta") if name in FORMS[form].fitted]
    parameters = {
        label: {name: fit.parameters[name] for name in names}
        | ({"bits_per_parameter": kappa} if (kappa := laws[label].bits_per_parameter) else {})
        for label, fit in fits.items()
    }
    symbols = {name: SYMBOLS[name] for name in (*names, "bits_per_parameter")}
    if FORMS[form].proportional:
        why = "No form with exponents is determined in all."
    elif any(fit.aicc is None for fit in fits.values()):
        why = "It is the simplest form with exponents that all determine; some have too few grid points for AICc."
    else:
        why = "Of the forms with exponents that all determine, it has the smallest total AICc."
    return SideBySide(
        note=f"In one form, so that numbers can be compared: {form}, {FORMS[form].text}. {why}",
        panel=draw(
            "side-by-side",
            "Parameters of the laws",
            "Lines are 95 % intervals.",
            f"{', '.join(symbols.values())} of {len(laws)} laws with their 95 % intervals; the table has the numbers.",
            lambda: side_by_side_figure(parameters, symbols),
        ),
        table=TextTable(
            "Laws side by side",
            (
                "law",
                *(f"{SYMBOLS[name]} (95 %)" for name in names),
                f"{SYMBOLS['bits_per_parameter']} (95 %)",
                "R\N{SUPERSCRIPT TWO}",
                "form chosen for it",
                "runs",
                "not converged",
            ),
            [_row(label, law, fits[label], names) for label, law in laws.items()],
            words=(0, len(names) + 3),
            note="Not converged: unsaturated runs with more than a hundredth of their loss reduction in the last tenth "
            "of the steps.",
        ),
    )


def _row(label: str, law: LawFit, fit: FormFit, names: Sequence[str]) -> list[str]:
    return [
        label,
        *(_with_interval(fit.parameters[name]) for name in names),
        "-" if law.bits_per_parameter is None else _with_interval(law.bits_per_parameter),
        f"{fit.r2:.4f}",
        law.form,
        f"{len(law.observations):,}",
        f"{sum(map(unconverged, law.observations)):,}",
    ]


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ({show_interval(estimate.interval)})"
