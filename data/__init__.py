"""Where questions come from, and the data module that turns them into D_n."""

from data.questions import DemoQuestions, QuestionFile, QuestionSource
from data.reasoning_gym import ReasoningGym
from data.trajectories import TrajectoryDataModule

__all__ = ["DemoQuestions", "QuestionFile", "QuestionSource", "ReasoningGym", "TrajectoryDataModule"]
