"""Which of several callbacks of one kind acts."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

__all__ = ["last_of"]

AnyCallback = TypeVar("AnyCallback", bound=Callback)


def last_of(trainer: Trainer, kind: type[AnyCallback], acts: Callable[[Any], bool] = lambda _: True) -> AnyCallback:
    """The one listed last: it is the user's, behind the default one.

    Args:
        trainer: Whose callbacks; there is one of this kind.
        kind: Their class.
        acts: Which of them count.
    """
    return [c for c in trainer.callbacks if isinstance(c, kind) and acts(c)][-1]  # type: ignore[attr-defined]
