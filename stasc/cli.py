"""The command line: one configuration, and the parts of the program that it describes, put together."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from functools import partial
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from callbacks import Curves, Evaluation, IterationProgressBar, OuterLoop
from data import TrajectoryDataModule, demo, smollm2
from stasc.algorithm import Algorithm, STaSC
from stasc.errors import UserError
from stasc.experiment import Experiment
from stasc.house import OWN_PACKAGES, config_file
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.run import NEVER, START, TRAINING, FirstUse, Run, SystemRecord, first_use, flatten
from stasc.sampling import Sampler, VLLMSampler
from stasc.training.module import CorrectionSFT

MADE_HERE = {"demo": demo.base_model, "smollm2-135m": smollm2.base_model}
"""Names that ``model.base`` may have for a model that is made on the spot, and what makes it."""

RENAMED = {
    "batch_size": "batches.size",
    "prefix_sharing": "batches.prefix_sharing",
    "token_budget": "batches.token_budget",
    "group_corrections": "batches.group_corrections",
    "test_sampling": "evaluation.sampling",
    "test_samples": "evaluation.samples",
    "test_greedy": "evaluation.greedy",
}
"""Options of ``data`` by the names that they had in version 0.1."""

_TRAINER_OPTIONS_THAT_TRAIN = (
    *("precision", "gradient_clip_val", "gradient_clip_algorithm", "plugins"),
    *("limit_train_batches", "overfit_batches", "fast_dev_run"),
    *("min_epochs", "min_steps", "max_steps", "max_time"),
)
"""Lightning's options that have a part in what is learnt; the others say where and how it is."""


class ConfigFile(ActionConfigFile):
    """A config, by its path or its name, whose parts of ``data`` keep their own defaults.

    jsonargparse gives a part of another class the arguments of the part before it, as far as it takes them.
    That is right for an algorithm, which goes on with N_init and N_corr, and wrong for questions and a
    reward: those of another task have their own.
    """

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        """Lay the config over ``cfg``."""
        value = config_file(value)
        try:
            config = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            parts = config.get("data", {}).items()
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            parts = ()  # said below, by the parser
        for name, part in parts:
            class_path = part.get("class_path") if isinstance(part, dict) else part
            before = cfg.get(f"data.{name}")
            if class_path and isinstance(before, Namespace) and before.get("class_path") != class_path:
                cfg[f"data.{name}"] = None
        ActionConfigFile.apply_config(parser, cfg, dest, value)


class STaSCCLI(LightningCLI):
    """LightningCLI with the groups ``algorithm`` and ``sampler``, and ``run_dir`` and ``reuse``."""

    datamodule: TrajectoryDataModule
    model: CorrectionSFT

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a subcommand, whose configs are ``ConfigFile``s."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="A file or name; later ones go on top.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options beside those of the trainer, the model and the data."""
        parser.add_argument("--run_dir", type=str, default="runs/stasc", help="Folder of the run.")
        parser.add_argument(
            "--reuse",
            type=str | None,
            default=None,
            help="Another run, or a folder of runs: take M_0's draws from it where it was asked the same.",
        )
        parser.add_subclass_arguments(Algorithm, "algorithm", default=_class_path(STaSC))
        parser.add_subclass_arguments(Sampler, "sampler", default=_class_path(VLLMSampler))
        parser.link_arguments(
            ("run_dir", "trainer.logger"), "trainer.logger.init_args.save_dir", _loggers_folder
        )

    def before_instantiate_classes(self) -> None:
        """Check the trainer's options; make M_0 if it is one that is made here."""
        config = self.config[self.subcommand]
        if config.trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"trainer.precision is {config.trainer.precision}, which rounds small updates away, so that "
                "hardly anything is learnt: use bf16-mixed or 32-true."
            )
        if config.trainer.max_epochs is not None:
            raise UserError(
                "trainer.max_epochs is not for you to set: it follows from algorithm.iterations and "
                "algorithm.epochs."
            )
        if config.trainer.reload_dataloaders_every_n_epochs != 1:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs must stay 1: every iteration has its own D_n."
            )
        if isinstance(config.seed_everything, bool):
            raise UserError(f"seed_everything is {config.seed_everything}: it must be a number.")
        _check_devices(config.trainer.accelerator, config.trainer.devices)
        dumped = self.parser.dump(self.config, skip_unset=False)
        self.saved_config = yaml.safe_load(dumped)[self.subcommand]
        self.saved_config.pop("config", None)
        for logger in _loggers(config.trainer.logger):
            if logger.class_path.endswith(".WandbLogger"):
                logger.init_args.version = logger.init_args.version or Run(config.run_dir).wandb_id()
        if make := MADE_HERE.get(config.model.base):
            config.model.base = str(make())

    def instantiate_classes(self) -> None:
        """Let through the sentence of a part that can be null, which jsonargparse puts into its own."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            if lacks := re.search(r"class_path '([\w.]+)':\s+Requirement '([^']+)' not met", str(error)):
                raise UserError(
                    f"{lacks[1]} needs a package that is not installed: pip install '{lacks[2]}', or choose "
                    "another --trainer.logger."
                ) from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer the algorithm's epochs, and the run folder's places for curves and checkpoints."""
        config = self.config_init[self.subcommand]
        run, algorithm = Run(config.run_dir), config.algorithm
        kwargs["max_epochs"] = algorithm.iterations * algorithm.epochs
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = Curves(config.run_dir)
        # At the end of an epoch only: a checkpoint in its midst would skip an iteration on resume.
        checkpoint = ModelCheckpoint(
            run.checkpoints,
            filename=run.last_checkpoint.stem,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        callbacks = config.trainer.callbacks
        users = callbacks if isinstance(callbacks, list) else [callbacks]
        # The order matters, see callbacks/__init__.py.
        kwargs["callbacks"] = [Evaluation(), *filter(None, users), OuterLoop(), checkpoint]
        if config.trainer.enable_progress_bar is not False:
            kwargs["callbacks"].append(IterationProgressBar())
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"the trainer's settings do not work here: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Put the experiment together, which finds mistakes before an engine starts."""
        experiment = self.datamodule.experiment = self._experiment()
        if self.subcommand != "fit":
            output = self.datamodule.output_path(self.subcommand)
            if output.exists() and rank_zero_only.rank == 0:
                raise UserError(f"{output} exists: choose another --data.output, or remove it.")
            return
        self.model.check(self.trainer.strategy)
        if rank_zero_only.rank == 0:
            experiment.run.claim(self.saved_config, self._system_record(), self._first_use)

    def _experiment(self) -> Experiment:
        config, data = self.config_init[self.subcommand], self.datamodule
        questions = data.load_questions(self.subcommand)
        base = ModelFolder.locate(self.model.base)
        tokenizer, generation_config = base.tokenizer(), base.generation_config()
        dialogue = partial(
            Dialogue, tokenizer, generation_config=generation_config, template=self.model.template
        )
        return Experiment(
            algorithm=config.algorithm,
            sampler=config.sampler,
            dialogue=dialogue(prompts=data.prompts),
            training_dialogue=dialogue(prompts=data.training_prompts or data.prompts),
            answer=data.answer,
            reward=data.reward,
            questions=questions,
            sampling=data.sampling,
            evaluation=data.evaluation,
            base=base,
            run=Run(config.run_dir),
            seed=config.seed_everything,
            reuse=Path(config.reuse) if config.reuse else None,
        )

    def _system_record(self) -> SystemRecord:
        """What other programs shall know of the run's system."""
        algorithm = self.datamodule.experiment.algorithm
        options = {
            option: value
            for option, value in flatten(self.saved_config).items()
            if option != "seed_everything" and self._first_use(option, value, value) is not NEVER
        }
        return SystemRecord(
            name=algorithm.name,
            iterations=algorithm.iterations,
            threshold=algorithm.threshold,
            uses_references=algorithm.uses_references,
            seed=self.datamodule.experiment.seed,
            options=options,
        )

    def _first_use(self, option: str, before: Any, now: Any) -> FirstUse:
        """From where on it matters that an option is ``now`` what it was not ``before``: its part knows."""
        group, _, name = option.partition(".")
        experiment = self.datamodule.experiment
        parts = {
            "algorithm": experiment.algorithm,
            "sampler": experiment.sampler,
            "data": self.datamodule,
            "model": self.model,
        }
        if group in parts:
            name = name.removeprefix("init_args.")
            return START if name == "class_path" else first_use(parts[group].first_uses, name, before, now)
        if group == "trainer":
            return TRAINING if name.startswith(_TRAINER_OPTIONS_THAT_TRAIN) else NEVER
        return START if option == "seed_everything" else NEVER

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Start, or go on where the run folder's last checkpoint was written."""
        run = datamodule.experiment.run
        if not kwargs.get("ckpt_path") and run.last_checkpoint.is_file():
            kwargs["ckpt_path"] = str(run.last_checkpoint)
            rank_zero_only(print)(f"going on in {run.folder}", flush=True)
        self.trainer.fit(model, datamodule=datamodule, **kwargs)


def run() -> None:
    """Parse ``sys.argv`` and run; a user's mistake ends in one sentence on standard error and status 2."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # what devices there are, tips, the seed
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated.*")
    warnings.filterwarnings("ignore", message=".*has both parameters with requires_grad.*")  # LoRA under FSDP
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # test metrics are those of all processes
    warnings.filterwarnings("ignore", message=".*Detected call of `lr_scheduler.step.*")  # an empty D_n
    disable_progress_bar()  # of transformers, for every load and save of a model
    try:
        STaSCCLI(
            CorrectionSFT,
            TrajectoryDataModule,
            save_config_callback=None,  # Run.claim does it, before anything else is written
            seed_everything_default=42,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "reload_dataloaders_every_n_epochs": 1,  # every epoch has the batches of its own iteration
                "log_every_n_steps": 1,
                "enable_model_summary": False,
                "use_distributed_sampler": False,  # CorrectionBatches deals the steps out itself
            },
            parser_kwargs={"prog": "python -m stasc", "exit_on_error": False}
            | {name: {"exit_on_error": False} for name in STaSCCLI.subcommands()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except (UserError, ArgumentError, MisconfigurationException) as mistake:
        sentence = " ".join(str(mistake).split())
        options = {argument.partition("=")[0] for argument in sys.argv}
        if isinstance(mistake, ArgumentError):
            sentence = _own(mistake) or _renamed(sentence) or _not_ours(sentence) or sentence
            if not options & {"-c", "--config"}:
                sentence += " (no --config FILE was given)"
        print(f"stasc: {sentence}", file=sys.stderr)
        sys.exit(2)


def _own(refusal: BaseException | None) -> str | None:
    """The sentence of ours that jsonargparse has put into its own; None if there is none."""
    while refusal and not isinstance(refusal, UserError):
        refusal = refusal.__cause__
    return refusal and str(refusal)


def _renamed(refusal: str) -> str | None:
    """A sentence for a refused option that has another name or place now; None if it is none of those."""
    if re.search(r"data\.reward.*'marker' is not accepted", refusal):
        return (
            "rewards have no marker any more: set data.answer to stasc.answers.AfterMarker with that marker, "
            "which holds for every reward."
        )
    for old, new in RENAMED.items():
        if re.search(rf"\b{old}\b", refusal):
            return f"data.{old} is called data.{new} now: change it in the config or on the command line."
    return None


def _not_ours(refusal: str) -> str | None:
    """A sentence for what one of our packages was asked for and does not have; None for other refusals."""
    package, name = rf"(?P<package>{'|'.join(OWN_PACKAGES)})", r"(?P<name>\w+)"
    for pattern in (
        f"module '{package}' has no attribute '{name}'",
        rf"No module named '{package}\.{name}",
        f"cannot import name '{name}' from '{package}'",
    ):
        if found := re.search(pattern, refusal):
            ours, missing = found["package"], found["name"]
            return (
                f"stasc's own package {ours} has no {missing}: if you mean a folder or file {ours} of yours, "
                "give it another name, also in the class path."
            )
    return None


def _loggers(option: Any) -> list[Namespace]:
    """The class paths and arguments of ``trainer.logger``, which may be one, several, a bool or None."""
    several = option if isinstance(option, list) else [option]
    return [logger for logger in several if isinstance(logger, Namespace)]


def _loggers_folder(run_dir: str, option: Any) -> str:
    """Where the loggers of ``trainer.logger`` write: the run folder, and no other place."""
    for logger in _loggers(option):
        own = signature(resolve_name(logger.class_path)).parameters.get("save_dir")
        given = logger.init_args.get("save_dir")
        if own and given not in (None, own.default, run_dir):
            raise UserError(
                f"trainer.logger has save_dir {given}: loggers write to the run folder, so leave it out and "
                "set --run_dir."
            )
    return run_dir


def _class_path(cls: type) -> dict[str, str]:
    return {"class_path": f"{cls.__module__}.{cls.__name__}"}


def _check_devices(accelerator: Any, devices: Any) -> None:
    """Raise UserError if more devices are asked for than there are."""
    cuda = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and cuda == 0:
        raise UserError(
            "trainer.accelerator asks for a GPU and this machine has none that torch can use: "
            "set --trainer.accelerator cpu, --trainer.devices and --trainer.strategy."
        )
    on_cuda = cuda > 0 and accelerator in ("auto", "gpu", "cuda")
    there = cuda if on_cuda else os.cpu_count() or 1
    asked = int(devices) if str(devices).isdecimal() else 0
    if asked > there:
        raise UserError(
            f"trainer.devices is {asked} and this machine has {there} {'GPUs' if on_cuda else 'CPU cores'}: "
            "lower --trainer.devices."
        )
