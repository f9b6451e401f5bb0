"""Names that command lines need without importing the law: its forms, and measures of an adapter's size."""

from typing import Literal

__all__ = ["AdapterSize", "FormName"]

AdapterSize = Literal["rank", "effective_parameters"]

FormName = Literal["power", "power_offset", "ceiling", "ceiling_offset", "entropy_power", "stored_bits"]
"""See `pml.law.forms.FORMS`."""
