"""A quiet stderr: this project's own lines, once each, without library warnings about intended behaviour."""

import logging
import os
import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only

from pml.escape import one_line

__all__ = ["ignore_noise", "keep_quiet"]

NOISE = (
    ".*does not have many workers.*",
    ".*Previous log files in this directory will be deleted.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*smaller than the logging interval.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ".*It will use the implementation from `LightningModule` instance.*",
    ".*`is_gradient_checkpointing` is deprecated.*",
)
"""Library warnings about intended behaviour, as regular expressions."""

CHATTER = ("lightning.pytorch", "lightning.fabric")
"""Loggers whose info messages are tips and banners that every run repeats."""

OWN = ("callbacks", "data_modules", "pml")


def keep_quiet() -> None:
    """Show this project's log messages on stderr, and from libraries only warnings that matter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    for room in OWN:
        own = logging.getLogger(room)
        if not any(isinstance(handler, _ToStderr) for handler in own.handlers):
            own.setLevel(logging.INFO)
            own.addHandler(_ToStderr())
    ignore_noise()


def ignore_noise() -> None:
    """Hide library warnings about intended behaviour."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


class _ToStderr(logging.Handler):
    """Writes each line once, and below a warning only from rank 0: grid cells and ranks repeat the same lines."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        # Messages may contain text from data.
        line = "\n".join(one_line(part) for part in self.format(record).split("\n"))
        if line not in self._written and (getattr(rank_zero_only, "rank", 0) == 0 or record.levelno >= logging.WARNING):
            self._written.add(line)
            print(line, file=sys.stderr, flush=True)
