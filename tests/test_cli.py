"""The command line as a user meets it: bad input ends in one sentence, status 2, and nothing written."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_model
from transformers import BloomConfig

from stasc.__main__ import main
from stasc.cli import RENAMED

GOOD = {"question": "What are the last letters of Tim, Ruth and Olaf?", "references": ["m-h-f"]}


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs the program in this process and gives the sentence it ends with."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("STASC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(tmp_path / "model")

    def run(*arguments: object, config: str = "quickstart", command: str = "fit") -> str:
        base = [] if "--model.base" in arguments or config != "quickstart" else ["--model.base", model]
        options = ["--config", ROOT / f"configs/{config}.yaml", "--run_dir", run_dir, *base, *arguments]
        monkeypatch.setattr(sys, "argv", ["stasc", command, *map(str, options)])
        before = sorted(run_dir.rglob("*"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, error = capfd.readouterr()
        assert exit_info.value.code == 2
        assert "Traceback" not in out + error
        assert error.startswith("stasc: ")
        assert error.count("\n") == 1
        assert sorted(run_dir.rglob("*")) == before, "something was written"
        return error

    run.run_dir = run_dir
    run.model = model
    return run


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_option_by_its_name_of_version_0_1_is_told_its_new_one(refused, tmp_path, old, new):
    sentence = f"data.{old} is called data.{new} now: change it"
    assert sentence in refused(f"--data.{old}", 1)
    value = {"temperature": 0.5} if old == "test_sampling" else 1
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"data": {old: value}}))
    assert sentence in refused("--config", tmp_path / "old.yaml")


def jsonl(path, *rows: object):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        (
            "algorithm.variant",
            "XYZ",
            "'FIF', 'FIE', 'FNF', 'FNE', 'EIF', 'EIE', 'ENF', 'ENE']. Got value: XYZ",
        ),
        ("algorithm.n_init", 0, "algorithm.n_init is 0: it must be 1 or more"),
        ("algorithm.n_int", 3, "Option 'n_int' is not accepted"),
        ("algorithm", "null", 'Parser key "algorithm"'),
        ("data.batches.size", 0, "data.batches.size is 0"),
        ("data.batches.token_budget", 0, "data.batches.token_budget is 0"),
        ("data.evaluation.samples", 0, "data.evaluation.samples is 0"),
        ("data.evaluation.test_every", 0, "data.evaluation.test_every is 0"),
        ("data.validation", 1.5, "data.validation is 1.5, which takes 750 of the 500 training questions"),
        ("data.reward.marker", "x", "rewards have no marker any more: set data.answer to stasc.answers."),
        ("trainer.max_epochs", 3, "trainer.max_epochs is not for you to set: it follows from algorithm."),
        ("data.sampling.temperature", 0, "data.sampling.temperature is 0, so all draws"),
        ("data.sampling.top_p", 1.5, "top_p is 1.5: it must lie in (0, 1]"),
        ("model.base", "./nowhere", "model.base ./nowhere does not exist"),
        ("model.base", "nobody/nothing", "model.base 'nobody/nothing' is not a folder here, and the Hugging"),
        ("model.learning_rate", -1, "model.learning_rate is -1.0: it must be above 0"),
        ("model.template", "{enable_thinking: false}", "model.template has 'enable_thinking', which is no"),
        ("sampler", "NoSampler", 'Parser key "sampler"'),
        ("reuse", "./nowhere", "reuse is nowhere, which is not a folder: name a run, or a folder of runs"),
        ("seed_everything", "false", "seed_everything is False: it must be a number"),
        ("trainer.devices", 999, "trainer.devices is 999 and this machine has"),
        (
            "trainer.logger",
            "{class_path: CSVLogger, init_args: {save_dir: x}}",
            "trainer.logger has save_dir x: ",
        ),
        ("trainer.precision", "bf16-true", "trainer.precision is bf16-true, which rounds small updates away"),
        ("trainer.strategy", "no_such", "strategy='no_such'"),
        ("trainer.reload_dataloaders_every_n_epochs", 0, "trainer.reload_dataloaders_every_n_epochs"),
    ],
)
def test_a_wrong_option_is_named(refused, option, value, sentence):
    assert sentence in refused(f"--{option}", value)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the Python package wandb is installed")
def test_a_logger_whose_package_is_missing_is_named(refused):
    wandb = "lightning.pytorch.loggers.WandbLogger"
    sentence = f"{wandb} needs a package that is not installed: pip install 'wandb>="
    assert sentence in refused("--trainer.logger", wandb)
    assert sentence in refused("--trainer.logger", f"[callbacks.Curves, {wandb}]")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([GOOD, "{half\n"], "questions.jsonl, line 2: this is not JSON"),
        ([GOOD, {"question": "x"}], "questions.jsonl, line 2: there is no column 'references'"),
        ([{**GOOD, "references": []}], "questions.jsonl, line 1: 'references' is empty"),
        (
            [{**GOOD, "question": "why " * 4000}],
            "data.train, question '1': its initial prompt and the answers can need",
        ),
    ],
)
def test_a_mistake_in_the_questions_is_named(refused, tmp_path, rows, sentence):
    path = jsonl(tmp_path / "questions.jsonl", *rows)
    train = ("--data.train", "data.QuestionFile", "--data.train.path", path)
    assert sentence in refused(*train)


def test_a_model_without_chat_template_is_named(refused):
    (refused.model / "chat_template.jinja").unlink()
    assert f"the tokenizer in {refused.model} has no chat template" in refused()


def test_a_model_that_does_not_say_how_much_it_takes_is_named(refused):
    BloomConfig().save_pretrained(refused.model)
    assert f"{refused.model / 'config.json'} has no max_position_embeddings: add it" in refused()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_config_for_gpus_says_what_to_do_without_one(refused):
    assert "set --trainer.accelerator cpu" in refused(config="qwen_eif")


def test_a_run_folder_of_another_config_is_left_alone(refused):
    refused.run_dir.mkdir()
    other = {"algorithm": {"class_path": "stasc.algorithm.STaR", "init_args": {"n_init": 2}}}
    (refused.run_dir / "config.yaml").write_text(yaml.safe_dump(other))
    (refused.run_dir / "system.json").write_text("{}")
    (refused.run_dir / "iteration-01").mkdir()
    (refused.run_dir / "iteration-01/initial.jsonl").write_text("{}\n")
    assert (
        "holds a run with another --algorithm (stasc.algorithm.STaR, now stasc.algorithm.STaSC): "
        in refused()
    )
    assert yaml.safe_load((refused.run_dir / "config.yaml").read_text()) == other


def test_predictions_are_not_overwritten(refused, tmp_path):
    questions = jsonl(tmp_path / "questions.jsonl", {"question": "Who?"})
    refused.run_dir.mkdir()
    (refused.run_dir / "predict.jsonl").write_text("mine")
    predict = ("--data.predict", "data.QuestionFile", "--data.predict.path", questions)
    assert "predict.jsonl exists: choose another --data.output" in refused(*predict, command="predict")
    assert (refused.run_dir / "predict.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "class_path", "package", "missing"),
    [
        ("data.reward", "data.Mine", "data", "Mine"),
        ("data.train", "data.mine.Mine", "data", "mine"),
        ("trainer.callbacks", "callbacks.Mine", "callbacks", "Mine"),
        ("data.reward", "thinks_data_is_its_own.Mine", "data", "Theirs"),
    ],
)
def test_a_users_module_of_a_name_of_ours_needs_another(
    refused, tmp_path, monkeypatch, option, class_path, package, missing
):
    (tmp_path / "thinks_data_is_its_own.py").write_text("from data import Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    sentence = refused(f"--{option}", class_path)
    assert f"stasc's own package {package} has no {missing}: if you mean" in sentence
    assert f"a folder or file {package} of yours, give it another name" in sentence


def test_an_overlays_questions_and_reward_keep_their_own_defaults(capsys, monkeypatch, tmp_path):
    first = {
        "class_path": "users_own.PaysInIteration",
        "init_args": {"iteration": 1, "calls_per_iteration": 9},
    }
    second = {"reward": "users_own.PaysSometimes", "test": {"class_path": "users_own.Sums"}}
    star = {"algorithm": "stasc.algorithm.STaR", "data": {"train": {"init_args": {"size": 7}}}}
    overlays = [{"data": {"reward": first}}, {"data": second}, star]
    options = ["--config", str(ROOT / "configs/quickstart.yaml")]
    for i, overlay in enumerate(overlays):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(overlay))
        options += ["--config", str(tmp_path / f"{i}.yaml")]
    monkeypatch.setattr(sys, "argv", ["stasc", "fit", *options, "--print_config"])
    with pytest.raises(SystemExit):
        main()
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["reward"]["init_args"] == {"iteration": 2, "calls_per_iteration": 5}
    assert config["data"]["test"]["init_args"] == {"size": 3, "split": "all"}
    train = config["data"]["train"]
    assert (train["class_path"], train["init_args"]["size"]) == ("data.DemoQuestions", 7), "the same class"
    assert config["algorithm"]["init_args"]["n_init"] == 2, "an algorithm goes on with what it takes"


def test_a_config_by_a_name_that_there_is_not(refused):
    assert "there is no config quick_start: give a file, or the name of one in" in refused(
        "--config", "quick_start"
    )


def test_validate_without_questions_is_refused(refused):
    assert "data.validation is not set" in refused(command="validate")


def test_predict_without_questions_is_refused(refused):
    assert "data.predict is not set" in refused(command="predict")


@pytest.mark.slow
def test_without_a_config_the_message_says_so(stasc):
    process = stasc("fit")
    assert process.returncode == 2
    assert process.stderr.startswith("stasc: ")
    assert process.stderr.endswith("(no --config FILE was given)\n")


def test_top_level_help_loads_no_library():
    program = [sys.executable, "-X", "importtime", "-m", "stasc", "--help"]
    process = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m stasc fit --config quickstart" in process.stdout
    assert "torch" not in process.stderr
    assert "jsonargparse" not in process.stderr


@pytest.mark.slow
def test_printed_config_is_a_config(stasc, tmp_path):
    first = stasc(
        "fit", "--config", ROOT / "configs/quickstart.yaml", "--algorithm.variant", "FNF", "--print_config"
    )
    assert first.returncode == 0, first.stderr
    path = tmp_path / "printed.yaml"
    path.write_text(first.stdout)
    second = stasc("fit", "--config", path, "--print_config")
    assert second.stdout == first.stdout
    assert yaml.safe_load(first.stdout)["algorithm"]["init_args"]["variant"] == "FNF"


@pytest.mark.slow
def test_a_model_folder_is_evaluated_and_answers_questions(stasc, tmp_path):
    """validate, test and predict, here on a random model."""
    model = tiny_model(tmp_path / "model")
    rows = [{"text": f"Why {i}?", "answer": "a"} for i in range(5)]
    path = jsonl(tmp_path / "my questions.jsonl", *rows)
    columns = {"question": "text", "references": "answer", "path": str(path)}
    common = ["--config", ROOT / "configs/quickstart.yaml", "--run_dir", tmp_path / "run"]
    common += ["--model.base", model, "--sampler", "TransformersSampler"]
    for split in ("train", "test", "predict"):
        common += [f"--data.{split}", json.dumps({"class_path": "data.QuestionFile", "init_args": columns})]
    for command in ("validate", "test"):
        process = stasc(command, *common)
        assert process.returncode == 0, process.stderr
        assert "wrong_to_right" in process.stdout
        trajectories = [json.loads(line) for line in (tmp_path / "run" / f"{command}.jsonl").open()]
        assert [t["question"]["text"] for t in trajectories] == [row["text"] for row in rows]
    process = stasc("predict", *common, "--data.output", tmp_path / "out.jsonl")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [a["question"] for a in answers] == [row["text"] for row in rows]
    assert all(set(a) == {"id", "question", "initial_answer", "correction"} for a in answers)
    assert answers[0]["initial_answer"] == trajectories[0]["answers"][0]["text"]


@pytest.mark.slow
def test_the_readmes_own_task(stasc, tmp_path):
    """The lines that the README tells a user to write, laid over one of the paper's configs."""
    path = jsonl(tmp_path / "mine.jsonl", *({"question": f"Why {i}?", "answers": ["a"]} for i in range(3)))
    readme = (ROOT / "README.md").read_text()
    lines = re.search(r"```yaml\n(data:\n  train:.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "my_task.yaml").write_text(re.sub(r"my_train\.jsonl|user/my-data-set", str(path), lines))
    process = stasc(
        *("test", "--config", ROOT / "configs/qwen_eif.yaml", "--config", tmp_path / "my_task.yaml"),
        *("--run_dir", tmp_path / "run", "--model.base", tiny_model(tmp_path / "model")),
        *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.strategy", "auto"),
        *("--sampler", "TransformersSampler", "--data.evaluation.sampling.max_tokens", 8),
    )
    assert process.returncode == 0, process.stderr
    questions = [json.loads(line)["question"] for line in (tmp_path / "run/test.jsonl").open()]
    assert [question["text"] for question in questions] == ["Why 0?", "Why 1?", "Why 2?"]
