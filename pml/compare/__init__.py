"""Methods compared over pairs of runs: how much each made certain, how much it got right, and at what cost.

outcomes      what runs are compared in
pairs         which two runs are a pair, and whether they had the same budget
difference    the mean difference over pairs, its interval, and the verdict
comparison    `compare`, which brings these together
tables        what the command and the page show
"""

from pml.compare.comparison import Comparison, compare
from pml.compare.difference import Difference, paired_difference
from pml.compare.outcomes import OUTCOMES, Outcome
from pml.compare.tables import differences_tables, means_table

__all__ = [
    "OUTCOMES",
    "Comparison",
    "Difference",
    "Outcome",
    "compare",
    "differences_tables",
    "means_table",
    "paired_difference",
]
