"""Figures of laws, recall and training, one function each, in colours that colour-blind readers can tell apart."""

from pml.figures.law import agreement_figure, law_figure, map_figures, reduction_figure, residual_figure
from pml.figures.recall import first_failure_figure, recall_figure
from pml.figures.style import freeze_layout, png_bytes, save_figure, svg_data_uri
from pml.figures.training import Curves, learning_figure, phases_figure

__all__ = [
    "Curves",
    "agreement_figure",
    "first_failure_figure",
    "freeze_layout",
    "law_figure",
    "learning_figure",
    "map_figures",
    "phases_figure",
    "png_bytes",
    "recall_figure",
    "reduction_figure",
    "residual_figure",
    "save_figure",
    "svg_data_uri",
]
