"""What M_0 said is taken over from another run where it would say the same, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stasc.errors import UserError
from stasc.reuse import done_by_others
from stasc.run import Run, write_lines
from stasc.trajectory import Completion, Question, Trajectory, to_json

CONFIG = {
    "seed_everything": 1,
    "run_dir": "runs/a",
    "model": {"base": "M_0", "learning_rate": 1e-3, "lora": None},
    "data": {
        "train": {"class_path": "data.QuestionFile", "init_args": {"path": "train.jsonl"}},
        "sampling": {"temperature": 1.0},
        "test_sampling": {"temperature": 0.0},
        "test_samples": 1,
        "batch_size": 8,
    },
    "sampler": {"class_path": "stasc.sampling.VLLMSampler", "init_args": {"kv_cache_gib": 1}},
    "algorithm": {
        "class_path": "stasc.algorithm.STaSC",
        "init_args": {
            "variant": "EIE",
            "iterations": 3,
            "n_init": 2,
            "n_corr": 2,
            "threshold": 1.0,
            "rounds": 1,
        },
    },
    "trainer": {"devices": 1},
}
QUESTIONS = {
    name: [Question(f"{name} {i}", "Why?", ("a", "b")) for i in range(3)] for name in ("train", "test")
}
TRAIN = {"iteration-01/initial.jsonl", "iteration-01/trajectories.jsonl"}
TEST = {"iteration-00/test.jsonl"}


def changed(option: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *path, name = option.split(".")
    group = config
    for part in path:
        group = group[part]
    group[name] = value
    return config


def system(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {**CONFIG, "algorithm": {"class_path": class_path, "init_args": init_args}}


def finished_run(folder: Path, config: dict[str, Any] = CONFIG, stages: set[str] = TRAIN | TEST) -> None:
    """A run that has done these stages, with every question asked twice."""
    said = Completion("a", (1,), True)
    for stage in stages:
        asked = QUESTIONS["test" if "test" in stage else "train"]
        records = [Trajectory(question, j, 0, said, said, 1.0, 1.0) for question in asked for j in range(2)]
        write_lines(folder / stage, map(to_json, records))
    write_lines(folder / "config.yaml", [yaml.safe_dump(config)])


def taken(place: Path, config: dict[str, Any], questions=QUESTIONS, run: str = "new") -> set[str]:
    """Names of the stages that a run takes over, each from a file of that name."""
    folder = place / run
    found = done_by_others(Run(folder), place, config, questions)
    for stage, source in found.items():
        assert source.parts[-2:] == stage.parts[-2:]
        assert source.is_file()
        assert not stage.exists()
    return {str(stage.relative_to(folder)) for stage in found}


@pytest.mark.parametrize(
    ("option", "value", "same"),
    [
        ("run_dir", "runs/b", TRAIN | TEST),
        ("algorithm.init_args.variant", "FNF", TRAIN | TEST),
        ("algorithm.init_args.iterations", 10, TRAIN | TEST),
        ("algorithm.init_args.pair_all", True, TRAIN | TEST),
        ("model.learning_rate", 1e-5, TRAIN | TEST),
        ("model.lora", {"rank": 8}, TRAIN | TEST),
        ("data.batch_size", 4, TRAIN | TEST),
        ("algorithm.init_args.fixed_in_test", True, TRAIN | TEST),
        ("data.prefix_sharing", False, TRAIN | TEST),
        ("trainer.devices", 2, TRAIN | TEST),
        ("algorithm.init_args.n_init", 5, TEST),
        ("algorithm.init_args.n_corr", 5, TEST),
        ("algorithm.init_args.threshold", 0.5, set()),
        ("algorithm.init_args.yet_unknown", 1, set()),
        ("seed_everything", 2, set()),
        ("model.base", "another", set()),
        ("data.train.init_args.path", "other.jsonl", set()),
        ("data.sampling.temperature", 0.5, set()),
        ("data.test_samples", 4, set()),
        ("data.yet_unknown", 1, set()),
        ("sampler.class_path", "stasc.sampling.TransformersSampler", set()),
        ("sampler.init_args.batch_invariant", True, set()),
    ],
)
def test_what_is_taken_over_follows_from_equal_options(tmp_path, option, value, same):
    finished_run(tmp_path / "old")
    assert taken(tmp_path, changed(option, value)) == same


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (system("stasc.algorithm.STaR", iterations=3, n_init=2, n_corr=2, threshold=1.0, rounds=1), TEST),
        (system("stasc.algorithm.SelfRefine", rounds=3, threshold=1.0), TEST),
        (system("stasc.algorithm.Reflexion", rounds=3, threshold=1.0), set()),  # leaves right answers alone
        (system("users_own.System", threshold=1.0), set()),
    ],
)
def test_other_systems_share_no_more_than_the_evaluation(tmp_path, config, same):
    finished_run(tmp_path / "old")
    assert taken(tmp_path, config) == same


def test_a_users_own_system_shares_only_with_itself(tmp_path):
    config = system("users_own.System", iterations=3, variant="EIE")
    finished_run(tmp_path / "old", config)
    assert taken(tmp_path, config) == TRAIN | TEST
    assert taken(tmp_path, system("users_own.System", iterations=3, variant="FNF")) == set()


@pytest.mark.parametrize("name", ["train", "test"])
def test_other_questions_share_nothing(tmp_path, name):
    finished_run(tmp_path / "old")
    first, *rest = QUESTIONS[name]
    edited = [Question(first.id, first.text, ("another",)), *rest]
    same = TEST if name == "train" else TRAIN
    assert taken(tmp_path, CONFIG, {**QUESTIONS, name: edited}) == same
    assert taken(tmp_path, CONFIG, {**QUESTIONS, name: rest}) == same


def test_rounds_of_evaluation_come_from_the_run_that_has_most_of_them(tmp_path):
    second = {"iteration-00/test-round-2.jsonl"}
    self_refine = system("stasc.algorithm.SelfRefine", rounds=2, threshold=1.0)
    finished_run(tmp_path / "a")
    finished_run(tmp_path / "b", self_refine, TEST | second)
    assert taken(tmp_path, system("stasc.algorithm.SelfRefine", rounds=3, threshold=1.0)) == TEST | second
    found = done_by_others(Run(tmp_path / "new"), tmp_path, self_refine, QUESTIONS)
    assert {source.parents[1].name for source in found.values()} == {"b"}
    assert taken(tmp_path, CONFIG) == TRAIN | TEST, "it has one round"


def test_what_a_run_has_begun_itself_goes_on(tmp_path):
    finished_run(tmp_path / "old")
    finished_run(tmp_path / "new", stages={"iteration-01/initial.jsonl"})
    assert taken(tmp_path, CONFIG) == TEST


def test_stages_under_way_and_folders_of_no_run_are_passed_by(tmp_path):
    finished_run(tmp_path / "under way", stages={"iteration-01/initial.jsonl"})
    finished_run(tmp_path / "no run")
    (tmp_path / "no run" / "config.yaml").unlink()
    assert taken(tmp_path, CONFIG) == {"iteration-01/initial.jsonl"}
    assert taken(tmp_path, CONFIG, run="under way") == set()


def test_a_run_without_iterations_takes_no_training_answers(tmp_path):
    finished_run(tmp_path / "old")
    assert taken(tmp_path, changed("algorithm.init_args.iterations", 0)) == TEST


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere, which is not a folder"):
        done_by_others(Run(tmp_path), tmp_path / "nowhere", CONFIG, QUESTIONS)
