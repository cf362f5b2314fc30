"""What scores say about each other: two scorings of the same rollouts, or a trainer's against an engine's.

`compare` takes arrays, or `Scores`; `compare_files` takes files of scores. Neither needs torch.
"""

from vhead.report.causes import Cause
from vhead.report.comparison import Comparison, compare
from vhead.report.differences import Bucket, Difference, LogprobDifference, WorstToken
from vhead.report.files import compare_files

__all__ = [
    "Bucket",
    "Cause",
    "Comparison",
    "Difference",
    "LogprobDifference",
    "WorstToken",
    "compare",
    "compare_files",
]
