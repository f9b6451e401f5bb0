"""The names of the law's forms, for command lines that need nothing else of them."""

from typing import Literal

__all__ = ["FormName"]

FormName = Literal["power", "power_offset", "ceiling", "ceiling_offset", "entropy_power", "stored_bits"]
"""See `pml.law.forms.FORMS`."""
