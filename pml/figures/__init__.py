"""Figures of laws, recall and capacity, one a function, in colours that colour-blind readers can tell apart."""

from pml.figures.capacity import capacity_figure, stored_bits_figure
from pml.figures.heat_map import heat_map_figure
from pml.figures.law import agreement_figure, law_figure, reduction_figure, residual_figure
from pml.figures.recall import first_failure_figure, recall_figure, threshold_figure, token_loss_figure
from pml.figures.side_by_side import side_by_side_figure
from pml.figures.style import NothingToShow, png_bytes, save_figure, settle, svg_data_uri

__all__ = [
    "NothingToShow",
    "agreement_figure",
    "capacity_figure",
    "first_failure_figure",
    "heat_map_figure",
    "law_figure",
    "png_bytes",
    "recall_figure",
    "reduction_figure",
    "residual_figure",
    "save_figure",
    "settle",
    "side_by_side_figure",
    "stored_bits_figure",
    "svg_data_uri",
    "threshold_figure",
    "token_loss_figure",
]
