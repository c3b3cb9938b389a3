"""What users bring along and is wrong."""

import sys

from lightning.pytorch import Callback

from data import QuestionSource
from stasc.algorithm import STaSC
from stasc.reward import Reward
from stasc.sampling import TransformersSampler
from stasc.trajectory import Question

GOOD = Question("1", "Who?", ("Ann",))


class RaisesInLoad(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [][0]


class RaisesInInit(RaisesInLoad):
    def __init__(self) -> None:
        self.size = {}["size"]


class ExitsInLoad(QuestionSource):
    def load(self, *, with_references: bool = True):
        sys.exit(0)


class GivesTuples(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [GOOD, ("2", "Where?")]


class GivesNothing(QuestionSource):
    def load(self, *, with_references: bool = True):
        pass


class GivesAnIdTwice(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [GOOD, Question("1", "Where?", ("Rome",))]


class GivesListsOfReferences(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [Question("1", "Who?", ["Ann"])]


class GivesHalfACharacter(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [Question("1", "Who? \ud83d", ("Ann",))]


class GivesAZeroByte(QuestionSource):
    def load(self, *, with_references: bool = True):
        return [Question("1", "Who\0?", ("Ann",))]


class AsksNothing(STaSC):
    turns = ()


class NamesNoModel(STaSC):
    def initial_model(self, n: int):
        return None


class RaisesAtOnce(Callback):
    def __init__(self) -> None:
        1 / 0  # noqa: B018


class RaisesInScore(Reward):
    def score(self, prediction, references):
        return {}["score"]


class ExitsInScore(Reward):
    def score(self, prediction, references):
        sys.exit(0)


class TakesTooLittle(Reward):
    def score(self, prediction):
        return 1.0


class SelectsNothing(STaSC):
    def select(self, n, trajectories):
        return None


class LeavesOneOut(TransformersSampler):
    def sample(self, requests, sampling, stop_ids):
        return list(super().sample(requests, sampling, stop_ids))[1:]
