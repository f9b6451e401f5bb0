"""A fitted form as an equation in plain text, HTML and TeX."""

import math
import re
from collections.abc import Mapping

from uncertainties import ufloat

from pml.law.forms import FORMS, SHARPNESS_RANGE, AdapterSize, FormName

__all__ = ["Equation", "equation_of"]

MINUS = "\N{MINUS SIGN}"
Value = tuple[float, float | None]
"""The value of a parameter and its standard error, None where unknown."""


class Equation(str):
    """An equation as plain text, such as `dL = 3.21 r^0.47 l^-0.43 - 3.60`; HTML templates render it."""

    __slots__ = ()

    def __html__(self) -> str:
        text = re.sub(r"\b([rPlH])\b", r"<i>\1</i>", self.replace("-", MINUS))
        text = re.sub(r"\^(\S+?)(?=[ ,)]|$)", r"<sup>\1</sup>", text)
        text = re.sub(r"min_([\d.]+|p\b)", r"min<sub>\1</sub>", text)
        return text.replace("dL", "Δ<i>L</i>").replace("L0", "<i>L</i><sub>0</sub>")

    @property
    def latex(self) -> str:
        """The equation in TeX, without dollar signs."""
        text = self.replace("stored bits", r"\mathrm{stored\ bits}").replace("dL", r"\Delta L").replace("L0", "L_0")
        # A word, not an operator: the sharpness under an operator would touch the line below.
        text = re.sub(r"min_([\d.]+)", r"\\mathrm{min}_{\1}", text).replace("min(", r"\min(")
        text = re.sub(r"\^([^ ,]+)", r"^{\1}", re.sub(r"\bl\b", r"\\ell", text))
        text = re.sub(r" (?=(?:[rP]|\\ell)\^|P\b)", r"\\,", text)
        return re.sub(r"e\+?(-?)0*(\d+)", r" \\times 10^{\1\2}", text)


def equation_of(form: FormName, values: Mapping[str, Value], adapter_size: AdapterSize, errors: bool) -> Equation:
    """Write a fitted form as an equation.

    Args:
        form: The form.
        values: Its parameters with their standard errors.
        adapter_size: What the law counts as the adapter's size, written as `r` or `P`.
        errors: Whether to show standard errors.
    """
    kind, show = FORMS[form], _with_error if errors else _number
    sharpness = values.get("sharpness", (math.inf, None))[0]
    least = "min" if round(min(sharpness, 99)) >= SHARPNESS_RANGE[1] else f"min_{sharpness:.2g}"
    if kind.proportional:
        return Equation(f"stored bits = {least}({show(values['bits_per_parameter'])} P, H)")
    beta, beta_error = values["beta"]
    size = "r" if adapter_size == "rank" else "P"
    power = f"{show(values['C'])} {size}^{show(values['alpha'])} l^{show((-beta, beta_error))}"
    if kind.offset == "known":
        return Equation(f"dL = L0 - H/l + {least}({power}, H/l)")
    if kind.offset == "zero":
        return Equation(f"dL = {least}({power}, L0)" if kind.saturating else f"dL = {power}")
    b, b_error = values["b"]
    offset, (sign, other) = show((abs(b), b_error)), ("-", "+") if b < 0 else ("+", "-")
    return Equation(
        f"dL = {least}({power}, L0 {other} {offset}) {sign} {offset}"
        if kind.saturating
        else f"dL = {power} {sign} {offset}"
    )


def _number(value: Value) -> str:
    """The value to three significant digits, with an exponent only for very small or large numbers."""
    # Rounded first, so that 0.9996 becomes 1.00.
    number = float(f"{value[0]:.3g}")
    if number == 0 or not 1e-5 <= abs(number) < 1e5:
        return f"{number:.2e}" if number else "0"
    return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def _with_error(value: Value) -> str:
    """Value and standard error in brackets, rounded to two digits of the error unless the error is tiny."""
    number, error = value
    if error is None:
        return f"({_number(value)} ± ?)"
    if error < 1e-4 * abs(number):
        return f"({_number(value)} ± {error:.1e})"
    shown = f"{ufloat(number, error):.2u}".replace("+/-", " ± ")
    return shown if shown.startswith("(") else f"({shown})"
