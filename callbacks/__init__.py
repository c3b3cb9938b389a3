"""What happens around training: the outer loop, the evaluation of every M_n, and what is shown.

One ``fit`` of Lightning is all N iterations: epoch e (from 0) belongs to iteration n = e // E + 1, where E is
``algorithm.epochs``. The dataloader is made anew for each epoch. This is the order of the hooks:

    data.setup                          the engine starts with M_0
    module.configure_model              the trainer loads M_0
    (Lightning restores last.ckpt, if there is one)
    Evaluation.on_fit_start             hyper-parameters go to the loggers

    for each epoch:
      data.train_dataloader             steps 1 to 3 of iteration n: sample, correct, filter; batches of D_n
      Evaluation.on_train_epoch_start   M_{n-1} on the test questions, if the iteration begins
      OuterLoop.on_train_epoch_start    the engine gives its memory back; if the iteration begins, step 4:
                                        base model, fresh optimiser, schedule as long as D_n
      module.training_step ...          the micro-batches of the epoch (none, if D_n is empty)
      OuterLoop.on_train_epoch_end      M_n, if the iteration ends, with its probe and training metrics
      ModelCheckpoint                   last.ckpt, from which the next start goes on

    Evaluation.on_fit_end               M_N on the test questions, and the table of all iterations
    data.teardown                       the engine ends

Evaluation comes before OuterLoop, because the engine still holds M_{n-1} when the epoch begins: steps 1 and 2
have just used it. After OuterLoop its memory belongs to the trainer. In the last epoch nothing follows that
would load M_N into the engine, so its evaluation is in ``on_fit_end``; a run that was killed before that
finds it missing at the next start, when there is no epoch left to train.

On-policy each epoch is one update: train_dataloader samples with the weights as they are and gives the
batches of one step; on_train_epoch_end hands the new weights to the engine or, at the end of an iteration,
writes what its updates have sampled, and M_n. There is a checkpoint at the end of an iteration only.
"""

from callbacks.curves import Curves
from callbacks.evaluation import Evaluation
from callbacks.measurement import Measurement
from callbacks.outer_loop import OuterLoop
from callbacks.progress import TrainingProgress

__all__ = ["Curves", "Evaluation", "Measurement", "OuterLoop", "TrainingProgress"]
