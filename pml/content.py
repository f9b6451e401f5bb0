"""The base class of JSON files and answers: strict models that are the same when read back."""

import pydantic

__all__ = ["Content"]


class Content(pydantic.BaseModel):
    """A part of a JSON file or answer: no unknown keys, no changes, no infinities or NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
