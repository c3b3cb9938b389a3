"""Recipes: every model in ``configs/models`` with every task in ``configs/tasks``, read by the program."""

import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

from stasc.command_line.cli import run

MODELS = sorted(ROOT.glob("configs/models/*.yaml"))
TASKS = sorted(ROOT.glob("configs/tasks/*.yaml"))


def name(path: Path) -> str:
    return path.stem


@pytest.fixture
def parsed(monkeypatch, capsys):
    """What would run with some configs, one over the other."""

    def parse(*configs: Path) -> dict[str, Any]:
        options = [option for config in configs for option in ("--config", str(config))]
        monkeypatch.setattr(sys, "argv", ["stasc", "fit", *options, "--print_config"])
        with pytest.raises(SystemExit) as exit_info:
            run()
        out, error = capsys.readouterr()
        assert exit_info.value.code in (0, None), error
        return yaml.safe_load(out)

    return parse


def leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{at}.{key}" if at else key)
    else:
        yield at, tree


def is_class_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("lightning.", "stasc.", "transformers."))


def same(found: Any, asked: Any) -> bool:
    """Whether the parser, which writes times in its own way, has understood a value."""
    return str(found).lstrip("0") == str(asked).lstrip("0")


@pytest.mark.parametrize("recipe", MODELS, ids=name)
def test_a_recipe_holds_what_belongs_to_a_model_and_lies_over_any_config(parsed, recipe):
    asked = yaml.safe_load(recipe.read_text())
    assert asked.keys() == {"model", "sampler", "trainer"}
    assert 7e-6 <= asked["model"]["learning_rate"] <= (1e-4 if "lora" in asked["model"] else 2e-5)
    below = ROOT / "configs/qwen_eif.yaml"
    found, paper = parsed(below, recipe), parsed(below)
    options = dict(leaves(found))
    for option, value in leaves(asked):
        assert same(options[option], value), option
    for group in ("data", "algorithm", "run_dir"):
        assert found[group] == paper[group]
    policies = found["trainer"]["strategy"]["init_args"].get("auto_wrap_policy", [])
    assert all(issubclass(locate(policy), torch.nn.Module) for policy in policies)
    paths = [v for _, value in leaves(asked) for v in (value if isinstance(value, list) else [value])]
    assert all(isinstance(locate(path), type) for path in filter(is_class_path, paths))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=name)
def test_every_model_goes_with_every_task(parsed, task):
    assert yaml.safe_load(task.read_text()).keys() == {"data"}
    for recipe in MODELS:
        found = parsed(recipe, task)
        assert found["model"]["base"] == yaml.safe_load(recipe.read_text())["model"]["base"]
    assert parsed(task, MODELS[0]) == parsed(MODELS[0], task)
