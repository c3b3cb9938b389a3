"""The model card of M_n: the README.md of its folder, as the Hugging Face hub shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stasc.experiment import Experiment
from stasc.model_folder import ModelFolder
from stasc.run import read_json, write_lines
from stasc.statistics import verdict
from stasc.texts import inline_code, table_cell

_SNIPPET = """\
from stasc.self_corrector import SelfCorrector

corrector = SelfCorrector.from_pretrained(".")
trajectory = corrector.ask({question!r})
for answer in trajectory.answers:
    print(f"{{answer.prompt}}: {{answer.text}}")
"""

_TRAINING = ("learning_rate", "weight_decay", "warmup_ratio", "lora")
_LICENCE = ("license", "license_name", "license_link")


def write_card(experiment: Experiment, n: int) -> None:
    """Write the card of M_n, which is evaluated; the same evaluation always gives the same bytes.

    The licence is that of M_0's own card, where its folder has one. Local paths are not told, but for the
    last part.
    """
    config, manual = experiment.run.read_config(), experiment.manual
    m_0, m_n = (read_json(experiment.run.iteration(m).metrics) for m in (0, n))
    groups = [group for group in ("validation", "test") if group in m_n]
    found = m_n[groups[-1]]
    base, licence = config["model"]["base"], _licence(experiment.base)
    sources = {name: config["data"][name] for name in ("train", "validation", "test")}
    header = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        **licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["stasc", "self-correction"],
        datasets=_hub_datasets(sources),
    )
    questions = experiment.questions[groups[-1]]
    initial_model = experiment.algorithm.test_initial_model(n)
    data, model = config["data"], config["model"]
    training = {
        "seed": experiment.seed,
        "algorithm": _without(config["algorithm"], "iterations"),
        "model": {name: model[name] for name in _TRAINING if model[name] is not None},
        "batch size": data["batches"]["size"],
        "sampling": data["sampling"],
        "sampling in evaluation": data["evaluation"]["sampling"],
        "answer": data["answer"],
        "reward": data["reward"],
    }
    card = (
        _jinja()
        .get_template("model_card.md")
        .render(
            header=header.to_yaml(),
            system=experiment.algorithm.name,
            n=n,
            base=f"[{base}](https://huggingface.co/{base})"
            if _is_hub_id(base)
            else table_cell(_portable(base)),
            base_name=table_cell(base.rstrip("/").rpartition("/")[2]),
            licence=table_cell(", ".join(licence.values())) or "the base model's folder names none",
            data=[(name, _described(source)) for name, source in sources.items() if source is not None],
            snippet=_SNIPPET.format(question=questions[0].text),
            initial_model=initial_model if initial_model != n else None,
            rewards=[
                (group, f"M_{m}", *_rewards(metrics[group]), metrics[group]["count"])
                for group in groups
                for m, metrics in ((0, m_0), (n, m_n))
                if group in metrics
            ],
            verdict=verdict(f"M_{n}", found["delta"], found["delta_p"], found.get("repeated")),
            prompts=[(turn, manual.prompts[turn]) for turn in dict.fromkeys(manual.turns)],
            training=yaml.safe_dump(_portable(training), sort_keys=False, allow_unicode=True),
        )
    )
    write_lines(experiment.model_folder(n) / "README.md", card.rstrip("\n").split("\n"))


def _jinja() -> Environment:
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"cell": lambda text: text.replace("|", "\\|"), "fenced": _fenced}
    return jinja


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever the text holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _rewards(metrics: Mapping[str, Any]) -> list[str]:
    """r(Y1), r(Y2) and Delta with their intervals; a single question has none."""
    cells = []
    for name, form, low, high in (("r1", ".3f", 0, 1), ("r2", ".3f", 0, 1), ("delta", "+.3f", -1, 1)):
        value, error = metrics[name], metrics.get(f"{name}_se")
        cell = f"{value:{form}}"
        if error is not None:
            ends = max(low, value - 1.96 * error), min(high, value + 1.96 * error)
            cell += " [{}]".format(", ".join(f"{end:{form}}" for end in ends))
        cells.append(cell)
    return cells


def _licence(base: ModelFolder) -> dict[str, str]:
    """What the header of the base model's card says of its licence, if there is such a card."""
    path = base.path / "README.md"
    try:
        header = ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        header = {}
    return {name: header[name] for name in _LICENCE if isinstance(header.get(name), str)}


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _hub_datasets(sources: Mapping[str, Any]) -> list[str] | None:
    parts = [source.get("init_args", {}) for source in sources.values() if isinstance(source, dict)]
    return list(dict.fromkeys(part["path"] for part in parts if _is_hub_id(part.get("path")))) or None


def _described(source: Any) -> str:
    """A source of questions in a line."""
    if not isinstance(source, dict):
        return f"{source} of train, held out"
    options = {name: value for name, value in source.get("init_args", {}).items() if value is not None}
    text = yaml.safe_dump(_portable(options), default_flow_style=True, sort_keys=False, width=10**6).strip()
    return f"`{source['class_path']}` {inline_code(text)}"


def _without(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    options = {key: value for key, value in part.get("init_args", {}).items() if key != name}
    return {"class_path": part["class_path"], "init_args": options}


def _portable(value: Any) -> Any:
    """A value without the folders of local paths in it."""
    if isinstance(value, dict):
        return {name: _portable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_portable(part) for part in value]
    if isinstance(value, str) and "/" in value and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value
