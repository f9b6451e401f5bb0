"""Laws beside each other: how exponents and capacity move with the budget, the rate, the place or the method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pml.figures import side_by_side_figure
from pml.law import FORMS, Estimate, FormFit, FormName, LawFit, unconverged
from pml.report.law_part import NAMES, SYMBOLS, UNITS, interval_text
from pml.report.parts import Panel, TextTable, draw

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

    The laws are of different cells, so their criteria add up; where some law has too few sizes for one, the simplest is
    taken. Where there is no such form, it is the one of bits per parameter if all have that, and None otherwise.
    """
    fits = [{fit.form: fit for fit in law.fits if fit.determined} for law in laws.values()]
    shared = [name for name, form in FORMS.items() if not form.proportional and all(name in found for found in fits)]

    def criterion(name: FormName) -> tuple[float, int]:
        total = sum(math.inf if (value := found[name].aicc) is None else value for found in fits)
        return total, len(FORMS[name].parameters)

    of_bits: FormName | None = "stored_bits" if all("stored_bits" in found for found in fits) else None
    return min(shared, key=criterion, default=of_bits)


def side_by_side(laws: Mapping[str, LawFit]) -> SideBySide | None:
    """Compare laws by what they are called; None where there are fewer than two, or they have no form in common."""
    if len(laws) < 2 or (form := common_form(laws)) is None:
        return None
    fits = {label: law.fit_of(form) for label, law in laws.items()}
    names = [name for name in ("alpha", "beta") if name in FORMS[form].parameters]
    parameters = {
        label: {name: fit.parameters[name] for name in names}
        | ({"kappa": kappa} if (kappa := laws[label].kappa) else {})
        for label, fit in fits.items()
    }
    symbols = {name: SYMBOLS[name] + UNITS.get(name, "") for name in (*names, "kappa")}
    if FORMS[form].proportional:
        why = "No form with exponents is determined in all."
    elif any(fit.aicc is None for fit in fits.values()):
        why = "Of the forms with exponents that all determine it is the simplest; some have too few sizes for AICc."
    else:
        why = "Of the forms with exponents that all determine, its AICc is the smallest over all of their runs."
    return SideBySide(
        note=f"In one form, so that numbers can be compared: {NAMES[form]}, {FORMS[form].text}. {why}",
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
                f"{SYMBOLS['kappa']} in bits (95 %)",
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
        "-" if law.kappa is None else _with_interval(law.kappa),
        f"{fit.r2:.4f}",
        NAMES[law.form],
        f"{len(law.cells):,}",
        f"{sum(map(unconverged, law.cells)):,}",
    ]


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ({interval_text(estimate.interval)})"
