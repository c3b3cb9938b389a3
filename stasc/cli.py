"""The command line: one configuration, linked to all parts. Nothing else happens here."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from callbacks import Curves, Evaluation, IterationProgressBar, OuterLoop
from data import TrajectoryDataModule, demo
from stasc.algorithm import Algorithm, STaSC
from stasc.errors import UserError
from stasc.module import CorrectionSFT
from stasc.reuse import done_by_others
from stasc.run import copy_file
from stasc.sampling import Sampler, VLLMSampler

DEMO = "demo"
"""The name of the embedded task's own M_0, which is made on the spot."""


class STaSCCLI(LightningCLI):
    """LightningCLI with the groups ``algorithm`` and ``sampler`` and the option ``run_dir``."""

    datamodule: TrajectoryDataModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The groups of the method, and how they reach those who need them."""
        parser.add_argument("--run_dir", type=str, default="runs/stasc", help="Folder of the run.")
        parser.add_argument(
            "--reuse",
            type=str | None,
            default=None,
            help="Another run, or a folder of runs: take over what M_0 said there and would say here.",
        )
        parser.add_subclass_arguments(Algorithm, "algorithm", default=_class_path(STaSC))
        parser.add_subclass_arguments(Sampler, "sampler", default=_class_path(VLLMSampler))
        parser.link_arguments("algorithm", "data.algorithm", apply_on="instantiate")
        parser.link_arguments("sampler", "data.sampler", apply_on="instantiate")
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("run_dir", "data.run_dir")
        parser.link_arguments("seed_everything", "data.seed")
        # These two follow from the algorithm: links, so that no config can change them.
        parser.link_arguments("algorithm", "trainer.max_epochs", compute_fn=_training_epochs)
        parser.link_arguments(
            "algorithm", "trainer.reload_dataloaders_every_n_epochs", compute_fn=lambda algorithm: 1
        )

    def before_instantiate_classes(self) -> None:
        """Check devices and precision; make the demo's M_0 if that is the model."""
        config = self.config[self.subcommand]
        if config.trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"trainer.precision is {config.trainer.precision}, which rounds small updates away, so that "
                "hardly anything is learnt: use bf16-mixed or 32-true."
            )
        _check_devices(config.trainer.accelerator, config.trainer.devices)
        dumped = self.parser.dump(self.config, skip_unset=False)
        self.saved_config = yaml.safe_load(dumped)[self.subcommand]
        self.saved_config.pop("config", None)
        if config.model.base == DEMO:
            config.model.base = config.data.base = str(demo.base_model())

    def instantiate_classes(self) -> None:
        """Let through the sentence of a part that can be null, which jsonargparse puts into its own."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer the run folder's places for curves and checkpoints."""
        run = self.datamodule.run
        given = self.config_init[self.subcommand].trainer
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif given.logger in (None, True):
            kwargs["logger"] = Curves(run.tensorboard)
        # At the end of an epoch only: a checkpoint in its midst would skip an iteration on resume.
        checkpoint = ModelCheckpoint(
            run.checkpoints,
            filename=run.last_checkpoint.stem,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        users = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        # Evaluation first, which has every epoch's points go where they belong, the user's too.
        kwargs["callbacks"] = [Evaluation(), *filter(None, users), OuterLoop(), checkpoint]
        if given.enable_progress_bar is not False:
            kwargs["callbacks"].append(IterationProgressBar())
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"the trainer's settings do not work here: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Find mistakes in what the configuration points to, before an engine starts or a file is written."""
        self.datamodule.load_questions(self.subcommand)
        if self.subcommand != "fit":
            output = self.datamodule.output_path(self.subcommand)
            if output.exists() and rank_zero_only.rank == 0:
                raise UserError(f"{output} exists: choose another --data.output, or remove it.")
            return
        self.model.check(self.trainer.strategy)
        if rank_zero_only.rank == 0:
            run, reuse, done = self.datamodule.run, self.saved_config["reuse"], {}
            if reuse is not None:
                done = done_by_others(run, Path(reuse), self.saved_config, self.datamodule.questions)
            run.claim(self.saved_config)
            for stage, source in done.items():
                copy_file(source, stage)

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Start, or go on where the run folder's last checkpoint was written."""
        last = datamodule.run.last_checkpoint
        if not kwargs.get("ckpt_path") and last.is_file():
            kwargs["ckpt_path"] = str(last)
            rank_zero_only(print)(f"going on in {datamodule.run.folder}", flush=True)
        self.trainer.fit(model, datamodule=datamodule, **kwargs)


def run() -> None:
    """Parse ``sys.argv`` and run; a user's mistake ends in one sentence on standard error and status 2."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # what devices there are, tips, the seed
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated.*")
    warnings.filterwarnings("ignore", message=".*has both parameters with requires_grad.*")  # LoRA under FSDP
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
        if isinstance(mistake, ArgumentError) and not options & {"-c", "--config"}:
            sentence += " (no --config FILE was given)"
        print(f"stasc: {sentence}", file=sys.stderr)
        sys.exit(2)


def _class_path(cls: type) -> dict[str, str]:
    return {"class_path": f"{cls.__module__}.{cls.__name__}"}


def _training_epochs(algorithm: Namespace) -> int:
    """Epochs of all fine-tunings; a system that is never trained has neither option."""
    options = algorithm.init_args
    return options.get("iterations", 0) * options.get("epochs", 1)


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
