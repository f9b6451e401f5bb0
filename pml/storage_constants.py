"""What a trainable parameter stores: the constants that ship, and those that `pml calibrate` measures."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import pydantic

from pml.content import Content
from pml.errors import InputError

__all__ = ["CONSTANTS_VERSION", "Constant", "ConstantsFile", "constant_for", "read_constants", "read_constants_file"]

CONSTANTS_VERSION: Final = 1


class Constant(Content):
    """What a trainable parameter stores at one placement, when more is asked of the adapter than it holds.

    Attributes:
        placement: `mlp_block` or names of linear layers.
        guarded: Whether A was guarded.
        bits_per_parameter: Mean, in bits per trainable parameter.
        low: Lower end of the interval.
        high: Upper end of the interval.
        interval: What kind of interval that is.
        source: What it was measured on.
    """

    placement: str | list[str]
    guarded: bool = False
    bits_per_parameter: float = pydantic.Field(gt=0)
    low: float = pydantic.Field(gt=0)
    high: float = pydantic.Field(gt=0)
    interval: str
    source: str


class ConstantsFile(Content):
    """The content of a file of constants, the latest first.

    Attributes:
        version: Version of this layout.
        constants: What was measured.
    """

    version: Literal[1]
    constants: list[Constant]


def read_constants(path: str | Path | None = None) -> list[Constant]:
    """Measured constants: those that ship, or those of a file that `pml calibrate` wrote, which come first.

    Raises:
        InputError: If the file cannot be read or does not hold constants.
    """
    shipped = ConstantsFile.model_validate_json((files("pml") / "storage_constants.json").read_bytes()).constants
    return shipped if path is None else [*read_constants_file(path).constants, *shipped]


def read_constants_file(path: str | Path) -> ConstantsFile:
    """What `pml calibrate` wrote.

    Raises:
        InputError: If the file cannot be read, does not hold constants, or holds those of another version.
    """
    try:
        return ConstantsFile.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); `pml calibrate --out` writes one") from error
    except pydantic.ValidationError as error:
        # Another version may differ in many fields; the version says it best.
        problem = min(error.errors(), key=lambda problem: problem["loc"] != ("version",))
        where = ".".join(map(str, problem["loc"])) or "file"
        raise InputError(
            f"{path}: not a file of constants of version {CONSTANTS_VERSION} ({where}: {problem['msg'].lower()}); "
            "`pml calibrate --out` writes one to a new file"
        ) from error


def constant_for(
    placement: str | list[str], guarded: bool, constants: Sequence[Constant]
) -> tuple[Constant, list[str]]:
    """The first constant of a placement, and warnings where what there is was measured elsewhere.

    Args:
        placement: Where the adapter sits.
        guarded: Whether its A is guarded.
        constants: What is known.
    """
    same = [known for known in constants if _as_set(known.placement) == _as_set(placement)]
    for known in same:
        if known.guarded == guarded:
            return known, []
    if same:
        return same[0], [f"measured {'with' if same[0].guarded else 'without'} the guard"]
    # Of placements that were never measured, the one that stores least: a plan errs on the side of what is recalled.
    least = min(constants, key=lambda known: known.bits_per_parameter)
    where = least.placement if isinstance(least.placement, str) else ", ".join(least.placement)
    return least, [f"nothing was measured at this placement; this is what {where} stores, the least of all"]


def _as_set(placement: str | list[str]) -> frozenset[str]:
    return frozenset([placement] if isinstance(placement, str) else placement)
