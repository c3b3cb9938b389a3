"""The command line as a user meets it: bad input ends in one sentence, status 2, and nothing written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_model
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers import BloomConfig

from stasc.__main__ import main
from stasc.command_line.refusals import RENAMED

GOOD = {"question": "What are the last letters of Tim, Ruth and Olaf?", "references": ["m-h-f"]}


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
            "algorithm.variant cannot be XYZ: it must be one of 'FIF', 'FIE', 'FNF', 'FNE', 'EIF', 'EIE'",
        ),
        ("algorithm.n_init", 0, "algorithm.n_init is 0: it must be 1 or more"),
        ("algorithm.n_init", 10**12, "algorithm.n_init is 1000000000000: it must be 1,000,000 or less"),
        ("algorithm.n_int", 3, "Option 'n_int' is not accepted"),
        ("algorithm", "null", "algorithm: "),
        ("data.batches.size", 0, "data.batches.size is 0"),
        ("data.batches.token_budget", 0, "data.batches.token_budget is 0"),
        ("data.evaluation.samples", 0, "data.evaluation.samples is 0"),
        ("data.evaluation.test_every", 0, "data.evaluation.test_every is 0"),
        ("data.validation", 1.5, "data.validation is 1.5, which takes 750 of the 500 training questions"),
        ("data.reward.marker", "x", "rewards have no marker any more: set data.answer to stasc.answers."),
        ("trainer.max_epochs", 3, "trainer.max_epochs is 3, which is not for you to set: how long a run"),
        ("data.sampling.temperature", 0, "data.sampling.temperature is 0, so all draws"),
        ("data.sampling.top_p", 1.5, "top_p is 1.5: it must lie in (0, 1]"),
        ("model.base", "./nowhere", "model.base ./nowhere does not exist"),
        ("model.base", "nobody/nothing", "model.base 'nobody/nothing' is not a folder here, and the Hugging"),
        ("model.learning_rate", -1, "model.learning_rate is -1.0: it must be above 0"),
        ("model.template", "{enable_thinking: false}", "model.template has 'enable_thinking', which is no"),
        ("sampler", "NoSampler", "sampler cannot be NoSampler: it must be a class path"),
        ("reuse", "./nowhere", "reuse is nowhere, which is not a folder: name a run, or a folder of runs"),
        ("seed_everything", "false", "seed_everything is False: it must be a number"),
        ("trainer.devices", 999, "trainer.devices is 999 and this machine has"),
        (
            "trainer.strategy",
            "{class_path: FSDPStrategy, init_args: {state_dict_type: sharded}}",
            "trainer.strategy.init_args.state_dict_type is sharded, and a run goes on from a checkpoint in",
        ),
        (
            "trainer.logger",
            "{class_path: CSVLogger, init_args: {save_dir: x}}",
            "trainer.logger has save_dir x: ",
        ),
        ("trainer.precision", "bf16-true", "trainer.precision is bf16-true, which rounds small updates away"),
        ("trainer.strategy", "no_such", "trainer.strategy is 'no_such': it must be one of auto, ddp"),
        (
            "trainer.strategy",
            "lightning.pytorch.strategies.DDPStrategy",
            "DDPStrategy': give a class as --trainer.strategy.class_path, or a name: auto, ddp, fsdp.",
        ),
        ("trainer.reload_dataloaders_every_n_epochs", 0, "trainer.reload_dataloaders_every_n_epochs"),
        (
            "trainer.limit_train_batches",
            1,
            "trainer.limit_train_batches is 1, which is not for you to set: every",
        ),
        (
            "trainer.max_steps",
            1,
            "trainer.max_steps is 1, which is not for you to set: how long a run trains",
        ),
        ("trainer.max_time", "00:00:01:00", "trainer.max_time is 00:00:01:00, which is not for you to set"),
        ("trainer.fast_dev_run", "true", "trainer.fast_dev_run is True, which is not for you to set"),
        ("trainer.val_check_interval", 0.5, "trainer.val_check_interval is 0.5, which is not for you to set"),
        ("trainer.gradient_clip_val", -1, "trainer.gradient_clip_val is -1: it must be 0 or more"),
        (
            "trainer.gradient_clip_val",
            "nan",
            "trainer.gradient_clip_val cannot be nan: it must be a number or",
        ),
        ("trainer.gradient_clip_val", ".nan", "trainer.gradient_clip_val is nan"),
        (
            "trainer.accumulate_grad_batches",
            17,
            "accumulate_grad_batches is 17, and data.batches.size 16, so that batches would have no",
        ),
        (
            "data.batches.token_budget",
            50,
            "token_budget is 50, and a prompt of training question",
        ),
        ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches is 0: it must be 1 or more"),
        ("trainer.devices", 0, "trainer.devices is 0: give the number of devices, 1 or more"),
        (
            "trainer.num_nodes",
            2,
            "trainer.num_nodes is 2, and MASTER_ADDR is not set: start the program with torchrun or srun",
        ),
        (
            "trainer.accelerator",
            "abacus",
            "trainer.accelerator is 'abacus': it must be one of auto, gpu, cpu",
        ),
        ("trainer.accelerator", "tpu", "trainer.accelerator is 'tpu': it must be one of"),
        ("trainer.precision", "16-mixed", "trainer.precision is 16-mixed, which a CPU does not have: use"),
        (
            "trainer.callbacks",
            "ModelCheckpoint",
            "trainer.callbacks has ModelCheckpoint, which has no place here: a run that was killed goes on",
        ),
        (
            "trainer.callbacks",
            "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}",
            "has no place here: set trainer.accumulate_grad_batches",
        ),
        (
            "trainer.logger",
            "{class_path: CSVLogger, init_args: {name: 'https://me:sesame@host/x'}}",
            "has a password or token, which would stand in config.yaml: leave it out",
        ),
        ("trainer.precision", "half", "trainer.precision cannot be half: it must be one of '"),
        ("trainer.logger", "no.Logger", "trainer.logger: no.Logger cannot be used (No module named 'no')"),
        (
            "trainer.callbacks",
            "EarlyStopping",
            "EarlyStopping cannot be used (the following arguments are req",
        ),
        (
            "algorithm.threshold",
            2,
            "algorithm.threshold is 2.0: it must be above 0 and, as rewards are, at most 1",
        ),
        ("model.weight_decay", -1, "model.weight_decay is -1.0: it must be 0 or more"),
        ("model.learning_rate", ".nan", "model.learning_rate is nan: give a number"),
        ("seed_everything", -1, "seed_everything is -1: it must be a number from 0 to 4294967295"),
        ("seed_everything", "true", "seed_everything is True: it must be a number"),
        ("run_dir", "", "run_dir is empty: name a folder"),
        ("run_dir", "ru\x1b[2Jn\0", "run_dir has a zero byte at place 8: remove it"),
        ("reuse", "", "reuse is empty: name a folder, or leave it out"),
        ("data.output", " ", "data.output is empty: name a file, or leave it out"),
        ("data.evaluation.marker", "", "data.evaluation.marker is blank: give a text, or null for none"),
        ("data.reward", "stasc.reward.Reward", "data.reward is stasc.reward.Reward, which judges nothing"),
        (
            "data.reward",
            "users_mistakes.AsksNothing",
            "AsksNothing cannot be used: name a subclass",
        ),
        ("data.train", "data.QuestionSource", "QuestionSource cannot be used: name one without abstract"),
        ("config", "/dev/zero", "the config /dev/zero has more than 16,777,216 bytes: name a YAML file"),
        ("run_dir", "/dev/null", "run_dir is /dev/null, which is a file"),
        ("run_dir", "/proc/nowhere", "run_dir /proc/nowhere cannot be written to"),
        ("ckpt_path", "last.ckpt", "ckpt_path is not for you to set"),
        ("modle.base", "demo", "unrecognized arguments: --modle.base"),
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
    ("content", "sentence"),
    [
        (b"run_dir: caf\xe9\n", "is not UTF-8 text: save it as UTF-8"),
        (b"", "is empty: write one option a line"),
        (b"- 1\n", "has no options: write one option a line"),
        (b"model: {learning_rate: [1\n", ", line 2: this is not YAML that can be read here"),
        (b"model: {base: a, base: b}\n", ", line 1: 'base' is there twice: remove one of them"),
        (b"model: &m {template: *m}\n", ", line 1: this value contains itself"),
        (
            b"a: &a [x, x, x, x, x, x, x, x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 8)) for n in range(98, 107)
            ),
            "its aliases stand for more than 1,000,000 values",
        ),
        (
            b"model: {learning_rate: fast}\n",
            "model.learning_rate (in {path}) cannot be fast: it must be a number",
        ),
        (b"modle: {base: demo}\n", "there is no option modle.base (in {path})"),
        (
            b"model: {base: 'a\\0b'}\n".replace(b"'", b'"').replace(b"\\\\", b"\\"),
            "model.base has a zero byte",
        ),
    ],
)
def test_a_broken_config_is_named_among_several(refused, tmp_path, content, sentence):
    good, path = tmp_path / "good.yaml", tmp_path / "broken.yaml"
    good.write_text("model: {weight_decay: 0.2}\n")
    path.write_bytes(content)
    refusal = refused("--config", path, "--config", good)
    assert sentence.format(path=path) in refusal
    assert "zero byte" in sentence or str(path) in refusal


PROMPTS = {
    "initial": [{"role": "user", "content": "{question}"}],
    "correction": [{"role": "user", "content": "{question} {initial_answer}"}],
}


@pytest.mark.parametrize(
    ("name", "messages", "sentence"),
    [
        (
            "initial",
            ["{question} {questoin}"],
            "data.prompts.initial has {questoin}, which stands for nothing",
        ),
        ("initial", ["{question} {answer_1}"], "has {answer_1}, which is not known where it is asked"),
        (
            "correction",
            ["{question} {initial_answer} {answer_2}"],
            "has {answer_2}, which is not known where",
        ),
        ("initial", ["{question}", " "], "data.prompts.initial: message 2 is empty"),
        ("initial", "{question}", "data.prompts cannot be {question}: it must be a list"),
    ],
)
def test_a_mistake_in_the_prompts_is_named(refused, tmp_path, name, messages, sentence):
    if isinstance(messages, list):
        messages = [{"role": "user", "content": content} for content in messages]
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump({**PROMPTS, name: messages}))
    assert sentence in refused("--data.prompts", path)


def test_a_prompt_that_is_there_twice_is_refused(refused, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(PROMPTS) + yaml.safe_dump({"initial": PROMPTS["initial"]}))
    assert "prompts.yaml, line 7: 'initial' is there twice" in refused("--data.prompts", path)


@pytest.mark.parametrize(
    ("option", "class_path", "sentence"),
    [
        (
            "data.train",
            "users_mistakes.RaisesInLoad",
            "RaisesInLoad.load of yours failed (IndexError: list index",
        ),
        (
            "data.train",
            "users_mistakes.RaisesInInit",
            "RaisesInInit.__init__ of yours failed (KeyError: 'size')",
        ),
        (
            "data.train",
            "users_mistakes.ExitsInLoad",
            "ExitsInLoad.load of yours failed (SystemExit: 0)",
        ),
        (
            "data.train",
            "users_mistakes.GivesAZeroByte",
            "GivesAZeroByte.load, question 1: its text has a zero byte at place 4: remove it",
        ),
        (
            "algorithm",
            "users_mistakes.AsksNothing",
            "AsksNothing.turns gave (): it must give a tuple of stasc.algorithm.Turn",
        ),
        (
            "data.train",
            "users_mistakes.GivesTuples",
            "data.train: GivesTuples.load, question 2: this is a tuple",
        ),
        (
            "data.train",
            "users_mistakes.GivesNothing",
            "GivesNothing.load gave a NoneType: it must return a list",
        ),
        (
            "data.train",
            "users_mistakes.GivesAnIdTwice",
            "GivesAnIdTwice.load, question 2: the id '1' was there",
        ),
        ("data.train", "users_mistakes.GivesListsOfReferences", "its references must be a tuple of texts"),
        (
            "data.train",
            "users_mistakes.GivesHalfACharacter",
            "question 1: its text has half a character, U+D83D",
        ),
        (
            "algorithm",
            "users_mistakes.NamesNoModel",
            "NamesNoModel.initial_model(1) gave None: it must give the",
        ),
        (
            "trainer.callbacks",
            "users_mistakes.RaisesAtOnce",
            "RaisesAtOnce cannot be used (division by zero)",
        ),
    ],
)
def test_a_mistake_in_the_users_own_code_is_named(refused, option, class_path, sentence):
    refusal = refused(f"--{option}", class_path)
    assert sentence in refusal
    assert "of yours failed" not in refusal or re.search(
        r"see .*users_mistakes\.py, line \d+\.$", refusal.strip()
    )


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
        ([{**GOOD, "references": ["m\0"]}], "questions.jsonl, line 1: 'references' has a zero byte"),
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


@pytest.mark.parametrize(
    ("option", "name", "sentence"),
    [
        ("data.reward", "RaisesInScore", "RaisesInScore.score of yours failed, on an answer to question '"),
        ("data.reward", "ExitsInScore", "ExitsInScore.score of yours failed (SystemExit: 0)"),
        ("data.reward", "TakesTooLittle", "TakesTooLittle.score of yours does not take what it is given"),
        ("algorithm", "SelectsNothing", "SelectsNothing.select gave None: it must give examples"),
        ("sampler", "LeavesOneOut", "the sampler LeavesOneOut answered 1 of 2 requests"),
        (
            "trainer.callbacks",
            "EarlyStopping",
            "EarlyStopping of trainer.callbacks failed (RuntimeError",
        ),
    ],
)
def test_an_error_in_what_a_user_named_is_told_and_its_traceback_is_in_a_file(
    capsys, monkeypatch, tmp_path, option, name, sentence
):
    options = ["--config", ROOT / "configs/quickstart.yaml", "--model.base", tiny_model(tmp_path / "model")]
    options += ["--sampler", "TransformersSampler", "--data.train.size", 2, "--data.test.size", 2]
    options += ["--data.sampling.max_tokens", 4, "--data.evaluation.sampling.max_tokens", 4]
    if name == "EarlyStopping":
        options += ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: nothing}}"]
    else:
        options += [f"--{option}", f"users_mistakes.{name}"]
    monkeypatch.setattr(sys, "argv", ["stasc", "fit", *map(str, options), "--run_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("stasc: ")
    assert sentence in told
    log = tmp_path / "run/error-0.log"
    assert log.is_file() == told.endswith(f"The whole traceback is in {log}.")
    if name == "RaisesInScore":
        question = told.split("'")[1]
        assert log.read_text().endswith(f"KeyError: 'score'\non an answer to question '{question}'\n")


@pytest.mark.parametrize(("output", "status"), [("/dev/full", 2), ("a reader that went away", 141)])
def test_standard_output_that_cannot_be_written(output, status):
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "stasc", "--help"],
            cwd=ROOT,
            stdout=full if output == "/dev/full" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    if process.stdout:
        process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == status
    full = "stasc: standard output cannot be written (No space left on device): see to that.\n"
    assert error == (full if status == 2 else "")


@pytest.mark.parametrize("place", ["/proc/nowhere/out.jsonl", "/dev/null/out.jsonl"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_sampled(refused, tmp_path, place):
    questions = jsonl(tmp_path / "questions.jsonl", {"question": "Who?"})
    predict = ("--data.predict", "data.QuestionFile", "--data.predict.path", questions)
    sentence = refused(*predict, "--data.output", place, command="predict")
    assert f"{place} cannot be written (" in sentence


def test_metrics_are_not_overwritten(refused):
    refused.run_dir.mkdir()
    (refused.run_dir / "test.metrics.json").write_text("mine")
    assert "test.metrics.json exists: choose another --data.output" in refused(command="test")
    assert (refused.run_dir / "test.metrics.json").read_text() == "mine"


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


def test_help_has_the_options_of_the_method_and_says_where_the_others_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stasc", "fit", "--help"])
    main()
    shown = capsys.readouterr().out
    options = ["algorithm.variant", "algorithm.n_init", "data.sampling", "model.base"]
    options += ["sampler.kv_cache_gib", "run_dir"]
    places = [shown.index(f"--{option} ") for option in options]
    assert places == sorted(places)
    assert "N_init, initial answers sampled for each question." in shown
    assert "--trainer" not in shown
    assert "python -m stasc fit --help all" in " ".join(shown.split())
    monkeypatch.setattr(sys, "argv", ["stasc", "fit", "--help", "all"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_printed_config_is_a_config(tmp_path, monkeypatch, capsys):
    def printed(config: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stasc", "fit", "--config", str(config), *arguments])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out

    whole = printed(ROOT / "configs/quickstart.yaml", "--algorithm.variant", "FNF", "--print_config")
    assert yaml.safe_load(whole)["algorithm"]["init_args"]["variant"] == "FNF"
    path = tmp_path / "printed.yaml"
    path.write_text(whole)
    short = printed(path, "--print_config=skip_default")
    assert len(short) < len(whole) / 2
    path.write_text(short)
    assert printed(path, "--print_config") == whole


@pytest.mark.slow
def test_a_model_folder_is_evaluated_and_answers_questions(stasc, tmp_path):
    """validate, test and predict, here on a random model."""
    model = tiny_model(tmp_path / "model")
    rows = [{"text": f"Why {i}?", "answer": "a"} for i in range(5)]
    path = jsonl(tmp_path / "my questions.jsonl", *rows)
    columns = {"question": "text", "references": "answer", "path": str(path)}
    common = ["--config", ROOT / "configs/quickstart.yaml", "--run_dir", tmp_path / "run"]
    common += ["--model.base", model, "--sampler", "TransformersSampler"]
    for split in ("train", "validation", "test", "predict"):
        common += [f"--data.{split}", json.dumps({"class_path": "data.QuestionFile", "init_args": columns})]
    for command in ("validate", "test"):
        process = stasc(command, *common)
        assert process.returncode == 0, process.stderr
        table = process.stdout.splitlines()[-2:]
        assert table[0].split()[:2] == ["r(Y1)", "r(Y2)"]
        name = {"validate": "validation", "test": "test"}[command]
        metrics = json.loads((tmp_path / "run" / f"{command}.metrics.json").read_text())
        measured, metrics = metrics["measured"], metrics[name]
        assert measured["model"] == {"base": str(model), "folder": str(model), "revision": None}
        assert measured["questions"][name]["count"] == 5
        assert measured["config"]["data"][name]["init_args"]["path"] == str(path)
        assert measured["libraries"]["torch"] == version("torch")
        assert table[1].split()[:3] == [name, f"{metrics['r1']:.3f}", f"{metrics['r2']:.3f}"]
        assert "test_step" not in process.stdout
        trajectories = [json.loads(line) for line in (tmp_path / "run" / f"{command}.jsonl").open()]
        assert [t["question"]["text"] for t in trajectories] == [row["text"] for row in rows]
    process = stasc("predict", *common, "--data.output", tmp_path / "out.jsonl")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [a["question"] for a in answers] == [row["text"] for row in rows]
    assert all(set(a) == {"id", "question", "initial_answer", "correction"} for a in answers)
    assert answers[0]["initial_answer"] == trajectories[0]["answers"][0]["text"]


@pytest.mark.slow
def test_the_docs_own_task(stasc, tmp_path):
    """The lines that docs/task.md tells a user to write, laid over one of the paper's configs."""
    path = jsonl(tmp_path / "mine.jsonl", *({"question": f"Why {i}?", "answers": ["a"]} for i in range(3)))
    page = (ROOT / "docs/task.md").read_text()
    lines = re.search(r'```yaml title="my_task.yaml"\n(.*?)```', page, re.DOTALL)[1]
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


def test_a_run_folder_at_home_is_there_and_in_no_folder_named_tilde(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").touch()
    (tmp_path / "place.yaml").write_text("run_dir: ~/mine\n")
    assert f"run_dir is {tmp_path / 'mine'}, which is a file" in refused("--config", tmp_path / "place.yaml")


def test_an_option_that_a_config_behind_it_overrides_is_told(tmp_path, monkeypatch, capsys):
    star = tmp_path / "star.yaml"
    star.write_text("algorithm: {class_path: stasc.algorithm.STaR, init_args: {n_corr: 0}}\n")
    words = ["--config", "quickstart", "--algorithm.n_corr=3", "--run_dir=x", f"--config={star}"]
    monkeypatch.setattr(sys, "argv", ["stasc", "fit", *words, "--algorithm.n_init", "7", "--print_config"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    told = f"stasc: --algorithm.n_corr stands before --config {star}, which has it too and wins.\n"
    assert printed.err == told
    options = yaml.safe_load(printed.out)["algorithm"]["init_args"]
    assert (options["n_corr"], options["n_init"]) == (0, 7)


def test_a_launcher_that_starts_too_few_processes_is_told_how_many(refused, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    sentence = refused("--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert "1 processes were started by the launcher, and trainer.num_nodes x trainer.devices is 2: have" in (
        sentence
    )
    assert "srun (--nodes=1 --ntasks-per-node=2)" in sentence


def test_a_launcher_that_starts_several_processes_for_one_device_is_told_two_ways(refused, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning has it, which looks when it is imported
    sentence = refused()
    assert sentence.startswith(
        "stasc: this is process 1 of a launcher (SLURM_PROCID), and one device takes one"
    )
    assert sentence.endswith("with its own run_dir, start it with env -u SLURM_PROCID -u SLURM_NTASKS.\n")


def test_the_job_for_slurm_starts_a_process_for_each_gpu_and_is_queued_again(tmp_path):
    for name, rest in (("srun", "sleep 20"), ("scontrol", "kill -TERM $PPID")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n{rest}\n')
        (tmp_path / name).chmod(0o755)
    of_slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "8",
    }
    environment = os.environ | of_slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    job = subprocess.Popen(
        ["bash", ROOT / "scripts/slurm.sh", "--config", "qwen_eif", "--run_dir", "a run"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = job.stdout.readline().split(" ", 2)[2]
    assert started == (
        "python -m stasc fit --config qwen_eif --run_dir a run --trainer.num_nodes 2 --trainer.devices 4\n"
    )
    job.send_signal(signal.SIGUSR1)
    assert job.stdout.readline() == "scontrol requeue 77\n"
    assert job.wait(10) == -signal.SIGTERM
    os.killpg(job.pid, signal.SIGKILL)  # srun


def test_setup_refuses_a_driver_that_cannot_run_cuda_13(tmp_path):
    for name in ("setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 535.183.01\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    refused = subprocess.run(
        ["bash", "setup.sh", "gpu"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("setup: the NVIDIA driver is 535.183.01, and CUDA 13 needs 580 or newer")
    assert not (tmp_path / ".venv").exists()
