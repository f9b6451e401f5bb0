"""Choosing the one that acts among several callbacks of one kind."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

__all__ = ["last_acting"]

AnyCallback = TypeVar("AnyCallback", bound=Callback)


def last_acting(trainer: Trainer, kind: type[AnyCallback], acts: Callable[[Any], bool] = lambda _: True) -> AnyCallback:
    """Return the last callback of this kind that acts; a user's own is listed after the default one.

    Args:
        trainer: The trainer; at least one of its callbacks qualifies.
        kind: Class of the callback.
        acts: Whether a callback of this kind acts.
    """
    return [c for c in trainer.callbacks if isinstance(c, kind) and acts(c)][-1]  # type: ignore[attr-defined]
