"""What happens around training: the outer loop over iterations, and the evaluation of every M_n."""

from callbacks.curves import Curves
from callbacks.evaluation import Evaluation
from callbacks.outer_loop import OuterLoop
from callbacks.progress import IterationProgressBar

__all__ = ["Curves", "Evaluation", "IterationProgressBar", "OuterLoop"]
