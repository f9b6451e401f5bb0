"""Methods compared over pairs of runs: how much each made certain, how much it got right, and at what cost.

outcomes      the numbers that runs are compared by
pairs         which two runs form a pair, and whether their budgets are equal
difference    the mean difference over pairs, its interval, and the verdict
comparison    `compare`, which brings these together
tables        the comparison as tables, for the command and the page
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
