"""Target tokens in TensorBoard: a picture, histograms and a table of the most stubborn ones at each look."""

from collections.abc import Sequence

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedTokenizerBase

from pml.last_seen import TokenStates
from pml.stubborn import stubborn_table
from pml.tables import markdown_table
from pml.token_history import History
from pml.token_pictures import grid_image, history_image

__all__ = ["show_history", "show_look"]

PROBABILITY_BINS = np.linspace(0.0, 1.0, 21)
MARGIN_BINS = np.linspace(-20.0, 20.0, 41)
"""In logits; the outermost bins also count what lies beyond them."""


def show_look(
    logger: TensorBoardLogger,
    standing: TokenStates,
    targets: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    threshold: float,
) -> None:
    """Write the picture, histograms and table of one look."""
    writer = logger.experiment
    lengths = [len(target) for target in targets]
    picture = grid_image(standing.probability, lengths, threshold, f"p of every target token at step {step}")
    writer.add_image("tokens/grid", picture, step, dataformats="HWC")
    known = ~np.isnan(standing.probability)
    if known.any():
        writer.add_histogram("tokens/p", standing.probability[known], step, bins=PROBABILITY_BINS)
    margin = standing.margin[~np.isnan(standing.margin)]
    if len(margin):
        inside = margin.clip(MARGIN_BINS[0], MARGIN_BINS[-1])
        writer.add_histogram("tokens/margin_in_logits", inside, step, bins=MARGIN_BINS)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    writer.add_text("tokens/most_stubborn", markdown_table(stubborn_table(standing, targets, text)), step)


def show_history(logger: TensorBoardLogger, history: History, threshold: float) -> None:
    """Write one picture of all looks."""
    picture = history_image(history, threshold, f"p of target tokens by position, {len(history.step)} looks")
    logger.experiment.add_image("tokens/history", picture, int(history.step[-1]), dataformats="HWC")
    logger.experiment.flush()
