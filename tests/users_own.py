"""What users bring along and name by its class path: systems, a reward, callbacks, a sampler."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data import QuestionSource
from stasc.algorithm import Algorithm, Turn
from stasc.filtering import improves
from stasc.reward import InAccuracy
from stasc.sampling import TransformersSampler
from stasc.trajectory import Example, Question, Trajectory


class ThreeTurns(Algorithm):
    """Two initial answers, a correction of each, and three second looks at a correction that is wrong.

    It learns second looks that improve, and unlearns a little the corrections that made a right answer wrong.

    Args:
        regret: Weight of a correction that is unlearnt.
        **common: Those of ``Algorithm``.
    """

    def __init__(self, regret: float = 0.25, **common: Any) -> None:
        super().__init__(**common)
        self.regret = regret

    @property
    def turns(self) -> tuple[Turn, ...]:
        return *super().turns, Turn("second_look", 3, self.ends_wrong)

    def test_turns(self, samples: int) -> tuple[Turn, ...]:
        return *super().test_turns(samples), Turn("second_look")

    def initial_model(self, n: int) -> int:
        return n - 1

    def base_model(self, n: int) -> int:
        return n - 1

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        for trajectory in trajectories:
            if trajectory.turn == 3 and improves(trajectory):
                yield trajectory.learn()
            if trajectory.reward(1) > trajectory.reward(2) and trajectory.path[2:] in ((), (0,)):
                yield trajectory.learn(turn=2, weight=-self.regret)


class TwoIterations(Algorithm):
    """A system without options, which fixes its iterations in code."""

    def __init__(self) -> None:
        super().__init__(iterations=2, n_init=2, epochs=2)

    @property
    def name(self) -> str:
        return "Two iterations"

    def initial_model(self, n: int) -> int:
        return n - 1

    def base_model(self, n: int) -> int:
        return 0

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        return (trajectory.learn() for trajectory in trajectories if self.right(trajectory.reward(2)))


class GivesTrajectories(TwoIterations):
    """Mistakes trajectories for examples."""

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        return iter(trajectories)


class PaysInIteration(InAccuracy):
    """In-accuracy in one iteration, which is known by counting the calls, and 0 before and after it."""

    def __init__(self, iteration: int, calls_per_iteration: int) -> None:
        self.iteration = iteration
        self.calls_per_iteration = calls_per_iteration
        self.calls = 0

    def score(self, prediction: str, references: Sequence[str]) -> float:
        iteration = self.calls // self.calls_per_iteration + 1
        self.calls += 1
        return super().score(prediction, references) if iteration == self.iteration else 0.0


class PaysSometimes(PaysInIteration):
    """With defaults of its own."""

    def __init__(self, iteration: int = 2, calls_per_iteration: int = 5) -> None:
        super().__init__(iteration, calls_per_iteration)


class PaysNothingInIteration2(InAccuracy):
    """In-accuracy but in iteration 2, which the files of the run tell, in whatever start of it."""

    def __init__(self, run: str) -> None:
        self.run = Path(run)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        begun, ended = ((self.run / f"iteration-0{n}" / "model").exists() for n in (1, 2))
        return 0.0 if begun and not ended else super().score(prediction, references)


class Sums(QuestionSource):
    """Doubles."""

    def __init__(self, size: int = 3, split: str = "all") -> None:
        self.size = size

    def load(self, *, with_references: bool = True) -> list[Question]:
        return [Question(f"{n}", f"{n} + {n}?", (f"{2 * n}",)) for n in range(self.size)]


class Kill(Callback):
    """kill -9 in a hook of Lightning, after so many training epochs; of one process, or of all."""

    def __init__(self, hook: str, epochs_done: int, rank: int | None = None) -> None:
        self.epochs_done = epochs_done
        self.rank = rank
        setattr(self, hook, self._now)

    def _now(self, trainer: Trainer, *_: object) -> None:
        if trainer.datamodule.epochs_done == self.epochs_done and self.rank in (trainer.global_rank, None):
            self._end()

    def _end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Fail(Kill):
    """An exception instead."""

    def _end(self) -> None:
        raise RuntimeError("a callback failed")


class WatchesEngine(Callback):
    """Compares what the engine holds with what trains, and kills the engine after the first update."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, experiment = trainer.datamodule, trainer.datamodule.experiment
        sequences = experiment.probe_sequences()
        found = experiment.sampler.log_probabilities(sequences)
        with torch.no_grad():
            for ids, values in zip(sequences, found, strict=True):
                scores = pl_module.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                expected = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=1e-4)
        link = experiment.run.handover / f"update-{data.epochs_done}" / "model.safetensors"
        with (Path(trainer.default_root_dir) / "links").open("a") as links:
            print(data.epochs_done, link.readlink().readlink() if link.is_symlink() else None, file=links)
        if data.epochs_done == 1:
            experiment.sampler._engine.kill()


class KeepsABatch(Callback):
    """Writes the tokens of the last batch to ``default_root_dir``."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.save(batch.input_ids, Path(trainer.default_root_dir) / "batch.pt")


class StaleSampler(TransformersSampler):
    """Claims to have taken the new weights, and samples from the old ones."""

    def load(self, model: Path) -> None:
        return None
