"""Bits that a trainable parameter stores: the shipped constants, and those that `pml calibrate` measures."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import pydantic

from pml.content import Content
from pml.default_backbone import DEFAULT_BACKBONE
from pml.errors import InputError

__all__ = [
    "CONSTANTS_VERSION",
    "Constant",
    "ConstantsFile",
    "constant_for",
    "placement_name",
    "read_constants",
    "read_constants_file",
]

CONSTANTS_VERSION: Final = 1


class Constant(Content):
    """Bits that a trainable parameter stores at one placement, when the adapter is given more than it can hold.

    Attributes:
        placement: `mlp_block` or names of linear layers.
        guarded: Whether A was guarded.
        bits_per_parameter: Mean, in bits per trainable parameter.
        low: Lower end of the interval.
        high: Upper end of the interval.
        interval: The kind of interval, such as `95 %`.
        source: What it was measured on.
        backbone: Name of the backbone that it was measured on, as `pml.backbone.load_backbone` takes it.
    """

    placement: str | list[str]
    guarded: bool = False
    bits_per_parameter: float = pydantic.Field(gt=0)
    low: float = pydantic.Field(gt=0)
    high: float = pydantic.Field(gt=0)
    interval: str
    source: str
    backbone: str = DEFAULT_BACKBONE


class ConstantsFile(Content):
    """The content of a file of constants.

    Attributes:
        version: Version of this layout.
        constants: The measured constants, the latest first.
    """

    version: Literal[1]
    constants: list[Constant]


def read_constants(path: str | Path | None = None) -> list[Constant]:
    """Read measured constants: those of a file that `pml calibrate` wrote, if given, then the shipped ones.

    Raises:
        InputError: As `read_constants_file` does.
    """
    shipped = ConstantsFile.model_validate_json((files("pml") / "storage_constants.json").read_bytes()).constants
    return shipped if path is None else [*read_constants_file(path).constants, *shipped]


def read_constants_file(path: str | Path) -> ConstantsFile:
    """Read a file of constants that `pml calibrate` wrote.

    Raises:
        InputError: If the file cannot be read, does not hold constants, or holds those of another version.
    """
    try:
        return ConstantsFile.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); `pml calibrate --out` writes one") from error
    except pydantic.ValidationError as error:
        # A file of another version differs in many fields; the version is the problem to report.
        problem = min(error.errors(), key=lambda problem: problem["loc"] != ("version",))
        where = ".".join(map(str, problem["loc"])) or "file"
        raise InputError(
            f"{path}: not a file of constants of version {CONSTANTS_VERSION} ({where}: {problem['msg'].lower()}); "
            "`pml calibrate --out` writes one to a new file"
        ) from error


def constant_for(
    placement: str | list[str], guarded: bool, backbone: str, constants: Sequence[Constant]
) -> tuple[Constant, list[str]]:
    """The constant that matches best, the first of several, with warnings that say how it was measured otherwise.

    Args:
        placement: Where the adapter sits.
        guarded: Whether its A is guarded.
        backbone: Name of the backbone.
        constants: The constants to choose from.
    """
    same = [known for known in constants if _as_set(known.placement) == _as_set(placement)]
    warnings = []
    if same:
        constant = min(same, key=lambda known: (known.guarded != guarded, known.backbone != backbone))
        if constant.guarded != guarded:
            warnings.append(f"bits per parameter were measured {'with' if constant.guarded else 'without'} the guard")
    else:
        # For a placement that was not measured, assume the lowest constant: better too high a rank than too low.
        alike = [known for known in constants if known.guarded == guarded] or constants
        constant = min(alike, key=lambda known: known.bits_per_parameter)
        least = f"what {placement_name(constant.placement)} stores, the least of all"
        warnings.append(f"nothing was measured at this placement; the plan assumes {least}")
    if constant.backbone != backbone:
        warnings.append(
            f"bits per parameter were measured on {constant.backbone}; `pml calibrate --backbone {backbone}` measures "
            "this one's"
        )
    return constant, warnings


def placement_name(placement: str | list[str]) -> str:
    """Where an adapter sits, in words."""
    return placement if isinstance(placement, str) else ", ".join(placement)


def _as_set(placement: str | list[str]) -> frozenset[str]:
    return frozenset([placement] if isinstance(placement, str) else placement)
