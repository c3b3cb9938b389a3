"""The command line: one configuration, and the parts of the program that it describes, put together."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from functools import partial
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import DistNetworkError, DistStoreError
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from callbacks import Curves, Evaluation, OuterLoop, TrainingProgress
from data import TrajectoryDataModule, demo, smollm2
from stasc.algorithm import Algorithm, STaSC
from stasc.command_line.config_file import check_named_files, check_value, read_config
from stasc.command_line.refusals import is_given, overridden, plain_words
from stasc.command_line.trainer_options import check_trainer_options
from stasc.disk import refusal
from stasc.ending import end_with_ranks
from stasc.errors import UserError
from stasc.experiment import Experiment
from stasc.house import config_file
from stasc.manual import Manual
from stasc.model_folder import ModelFolder
from stasc.progress import Progress, say, speaks
from stasc.prompting import Dialogue
from stasc.provenance import fingerprint, this_start
from stasc.run import NEVER, START, TRAINING, FirstUse, Run, SystemRecord, first_use, flatten
from stasc.sampling import Sampler, VLLMSampler
from stasc.texts import printable
from stasc.training.checkpoints import WholeCheckpoints, check_checkpoint
from stasc.training.module import CorrectionSFT
from stasc.training.weights import check_weights
from stasc.users_code import blame

MADE_HERE = {"demo": demo.base_model, "smollm2-135m": smollm2.base_model}
"""Names that ``model.base`` may have for a model that is made on the spot, and what makes it."""

SEED = 42
"""What all draws follow from, unless another number is given."""

_TRAINER_OPTIONS_THAT_TRAIN = (
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "plugins",
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
        path = config_file(value)
        parts = read_config(Path(path)).get("data")
        for name, part in parts.items() if isinstance(parts, dict) else ():
            class_path = part.get("class_path") if isinstance(part, dict) else part
            before = cfg.get(f"data.{name}")
            if class_path and isinstance(before, Namespace) and before.get("class_path") != class_path:
                cfg[f"data.{name}"] = None
        try:
            ActionConfigFile.apply_config(parser, cfg, dest, path)
        except (TypeError, ValueError, ArgumentError) as error:
            sentence = plain_words(error, ["--config", path])
            raise UserError(sentence if path in sentence else f"the config {path}: {sentence}") from error


class STaSCCLI(LightningCLI):
    """LightningCLI with the groups ``algorithm`` and ``sampler``, and the options of the run."""

    datamodule: TrajectoryDataModule
    model: CorrectionSFT

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a subcommand, whose configs are ``ConfigFile``s."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="A file or name; later ones go on top.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options beside those of the trainer, the model and the data."""
        self.add_run_arguments(parser)
        parser.add_subclass_arguments(Algorithm, "algorithm", default=_class_path(STaSC))
        parser.add_subclass_arguments(Sampler, "sampler", default=_class_path(VLLMSampler))
        parser.link_arguments(
            ("run_dir", "trainer.logger"), "trainer.logger.init_args.save_dir", _loggers_folder
        )

    @staticmethod
    def add_run_arguments(parser: ArgumentParser) -> None:
        """The options that belong to no part of the program."""
        parser.add_argument("--run_dir", type=str, default="runs/stasc", help="Folder of the run.")
        parser.add_argument(
            "--reuse",
            type=str | None,
            default=None,
            help="Another run, or a folder of runs: take M_0's draws from it where it was asked the same.",
        )
        parser.add_argument(
            "--keep_models",
            type=int | None,
            default=None,
            help="Keep so many models, the last ones, and the one that validation chooses; by default all.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what a command other than ``fit`` leaves open is as the model's manual has it.

        Code that a manual names is not imported unless the user names it too.
        The seed is checked here, because Lightning uses it at once.
        """
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        base = self.config[command].model.base
        if (
            command != "fit"
            and base not in MADE_HERE
            and (manual := Manual.find(ModelFolder.locate(base).path))
        ):
            options = manual.options
            if manual.names_code:
                if not is_given("data.answer", sys.argv):
                    name = manual.answer.get("class_path")
                    raise UserError(
                        f"the stasc.yaml of {base} names {name} as data.answer, which is code that did not "
                        f"come with stasc: if you trust it, give --data.answer {name} yourself."
                    )
                del options["data.answer"]
            self._parser(command).set_defaults(options)
            super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}: it must be a number from 0 to {2**32 - 1}.")

    def before_instantiate_classes(self) -> None:
        """Check the options; make M_0 if it is one that is made here."""
        config = self.config[self.subcommand]
        check_trainer_options(config.trainer.as_dict())
        for option in ("run_dir", "reuse", "data.output"):
            place = config[option]
            if place is not None and not place.strip():
                such = " for the run, such as runs/mine" if option == "run_dir" else ", or leave it out"
                raise UserError(
                    f"{option} is empty: name a {'file' if option == 'data.output' else 'folder'}{such}."
                )
            config[option] = place and at_home(place)
        if config.ckpt_path:
            raise UserError(
                "ckpt_path is not for you to set: a run goes on from its own folder's checkpoint, and "
                "test, validate and predict take the model of --model.base."
            )
        dumped = self.parser.dump(self.config, skip_unset=False)
        self.saved_config = yaml.safe_load(dumped)[self.subcommand]
        self.saved_config.pop("config", None)
        for option, value in flatten(self.saved_config).items():
            check_value(option, value)
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
            if "class_path" not in str(error) or blame(error):
                raise
            raise UserError(plain_words(error, sys.argv)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer the algorithm's epochs, and the run folder's places for curves and checkpoints."""
        config = self.config_init[self.subcommand]
        run, algorithm = Run(config.run_dir), config.algorithm
        kwargs["max_epochs"] = algorithm.iterations * algorithm.epochs
        # On SLURM Lightning starts from a checkpoint of its own kind that lies there, of whatever program.
        kwargs["default_root_dir"] = config.trainer.default_root_dir or config.run_dir
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = Curves(config.run_dir)
        # At the end of an epoch only: a checkpoint in its midst would skip an iteration on resume.
        # On-policy an epoch is a single update, and a start goes on from the end of an iteration.
        checkpoint = ModelCheckpoint(
            run.checkpoints,
            filename=run.last_checkpoint.stem,
            enable_version_counter=False,
            every_n_epochs=algorithm.epochs if algorithm.questions_per_update else 1,
            save_on_train_epoch_end=True,
        )
        callbacks = config.trainer.callbacks
        users = callbacks if isinstance(callbacks, list) else [callbacks]
        # The order matters, see callbacks/__init__.py.
        kwargs["callbacks"] = [Evaluation(), *filter(None, users), OuterLoop(), checkpoint]
        if config.trainer.enable_progress_bar is not False:
            kwargs["callbacks"].append(TrainingProgress())
        plugins = config.trainer.plugins
        users = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [WholeCheckpoints(), *filter(None, users)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"the trainer's settings do not work here: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Put the experiment together, which finds mistakes before an engine starts."""
        _check_processes(self.trainer)
        with Progress("reading the questions and the tokenizer"):
            experiment = self.datamodule.experiment = self._experiment()
        if rank_zero_only.rank == 0:  # it reads all of them
            check_weights(experiment.base)
        if self.subcommand != "fit":
            if rank_zero_only.rank == 0:
                self.datamodule.check_output(self.subcommand)
            return
        self.model.on_policy, self.model.stays_near_m0 = (
            experiment.on_policy,
            experiment.algorithm.stays_near_m0,
        )
        if experiment.on_policy:
            self.model.temperature = experiment.sampling.temperature
        self.datamodule.check_batches(self.trainer.accumulate_grad_batches)
        self.model.check(self.trainer.strategy)
        if rank_zero_only.rank == 0:
            experiment.run.lock()
            experiment.run.claim(self.saved_config, self._system_record(), self._first_use, experiment.origin)

    def _experiment(self) -> Experiment:
        config, data = self.config_init[self.subcommand], self.datamodule
        questions = data.load_questions(self.subcommand)
        base = ModelFolder.locate(self.model.base)
        if data.prompts is None:
            nor = "" if self.subcommand == "fit" else f", and {base.path} has no stasc.yaml that has them"
            raise UserError(f"data.prompts is not set{nor}: give a file, such as configs/prompts/paper.yaml.")
        if data.sampling is None and self.subcommand == "fit":
            raise UserError("data.sampling is not set: give temperature, top_p and max_tokens.")
        origin = this_start() | {
            "model": {
                "base": self.saved_config["model"]["base"],
                "folder": str(base.path),
                "revision": base.revision,
            },
            "questions": {
                name: fingerprint(asked) | {"revision": getattr(data.sources[name], "revision", None)}
                for name, asked in questions.items()
            },
        }
        if self.subcommand != "fit":  # beside a run's results lies its config.yaml
            origin["config"] = self.saved_config
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
            reuse=None if config.reuse is None else Path(config.reuse),
            keep_models=config.keep_models,
            origin=origin,
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI, without the option to show its table: ours is shown."""
        found = LightningCLI.subcommands()
        return found | {name: found[name] | {"verbose"} for name in ("validate", "test")}

    def test(self, **kwargs: Any) -> None:
        """Measure a model folder."""
        self.trainer.test(**kwargs, verbose=False)

    def validate(self, **kwargs: Any) -> None:
        """As ``test``, on the validation questions."""
        self.trainer.validate(**kwargs, verbose=False)

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Start, or go on where the run folder's last checkpoint was written."""
        run = datamodule.experiment.run
        going_on = not kwargs.get("ckpt_path") and run.last_checkpoint.is_file()
        if going_on:
            check_checkpoint(run.last_checkpoint)
            kwargs["ckpt_path"] = str(run.last_checkpoint)
        algorithm, questions = datamodule.experiment.algorithm, datamodule.experiment.questions
        counts = ", ".join(f"{len(asked):,} {name}" for name, asked in questions.items())
        say(f"{'going on in' if going_on else 'starting'} {run.folder}", timed=True)
        say(f"          {algorithm.name}, N = {algorithm.iterations}, questions: {counts}")
        try:
            self.trainer.fit(model, datamodule=datamodule, **kwargs)
        except UserError:
            raise
        except BaseException as error:
            sentence = blame(error) or self._refused_by_a_callback(error)
            if sentence is None:
                raise
            log = run.folder / f"error-{self.trainer.global_rank}.log"
            text = printable("".join(traceback.format_exception(error)), keep="\n")
            log.write_text(text, encoding="utf-8", errors="replace")
            raise UserError(f"{sentence} The whole traceback is in {log}.") from error
        finally:
            run.unlock()

    def _refused_by_a_callback(self, error: BaseException) -> str | None:
        """A sentence for an error in a library's callback that the user named; None for other errors."""
        option = self.config_init[self.subcommand].trainer.callbacks
        named = [callback for callback in (option if isinstance(option, list) else [option]) if callback]
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if any(frame.f_locals.get("self") is callback for callback in named):
                name = type(frame.f_locals["self"]).__name__
                return f"{name} of trainer.callbacks failed ({type(error).__name__}: {error}): see to it."
        return None


def help_text(command: str) -> str:
    """The method's options, with those of the classes that are the default; Lightning's are left out."""
    parser = ArgumentParser(
        f"python -m stasc {command}",
        usage=f"python -m stasc {command} --config FILE [--config FILE ...] [--OPTION VALUE ...]",
        description="What stands later wins, configs and options alike: so configs come first.",
        epilog=f"Another system or sampler has options of its own: --algorithm.help stasc.algorithm.STaR. "
        f"All options, those of Lightning's Trainer too: python -m stasc {command} --help all.",
        add_help=False,
    )
    parts = {"algorithm": STaSC, "data": TrajectoryDataModule, "model": CorrectionSFT, "sampler": VLLMSampler}
    for name, part in parts.items():
        parser.add_class_arguments(part, name)
    run_options = parser.add_argument_group("The run")
    STaSCCLI.add_run_arguments(run_options)
    run_options.add_argument("--seed_everything", type=int, default=SEED, help="What all draws follow from.")
    return parser.format_help()


def run() -> None:
    """Parse ``sys.argv`` and run.

    Raises:
        UserError: The user made a mistake.
    """
    if sys.argv[1] in STaSCCLI.subcommands() and {"-h", "--help"} & set(sys.argv):
        if sys.argv[-1] != "all":
            print(help_text(sys.argv[1]))
            return
        sys.argv.pop()
    for name in ("lightning.pytorch", "lightning.fabric"):  # what devices there are, tips, the seed
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated.*")
    warnings.filterwarnings("ignore", message=".*has both parameters with requires_grad.*")  # LoRA under FSDP
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # test metrics are those of all processes
    warnings.filterwarnings("ignore", message=".*Detected call of `lr_scheduler.step.*")  # an empty D_n
    warnings.filterwarnings("ignore", message=".*yielded None.*")  # the one batch of an empty D_n
    set_verbosity_error()  # transformers warns of what is refused here, or of no matter
    threading.excepthook = _in_a_thread
    disable_progress_bar()  # of transformers, for every load and save of a model
    subprocess_script._launch_process_observer = end_with_ranks
    try:
        check_named_files(sys.argv[1:])
        for sentence in overridden(sys.argv[2:]) if speaks() else ():
            print(f"stasc: {sentence}", file=sys.stderr)
        STaSCCLI(
            CorrectionSFT,
            TrajectoryDataModule,
            save_config_callback=None,  # Run.claim does it, before anything else is written
            seed_everything_default=SEED,
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
    except (DistNetworkError, DistStoreError) as error:  # nobody, or somebody else, is there
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the training processes cannot meet at {place} ({reason}): set the variables MASTER_ADDR and "
            "MASTER_PORT to an address and a free port of the first node."
        ) from error
    except ArgumentError as mistake:
        sentence = _own(mistake) or plain_words(mistake, sys.argv)
        if not {argument.partition("=")[0] for argument in sys.argv} & {"-c", "--config"}:
            sentence += " (no --config FILE was given)"
        raise UserError(sentence) from mistake
    except MisconfigurationException as mistake:
        raise UserError(str(mistake)) from mistake


def _in_a_thread(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps an error of the disk for whoever writes next: that will be told."""
    if failure.exc_value is None or refusal(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _own(error: BaseException | None) -> str | None:
    """The sentence of ours that jsonargparse has put into its own; None if there is none."""
    while error and not isinstance(error, UserError):
        error = error.__cause__
    return error and str(error)


def _loggers(option: Any) -> list[Namespace]:
    """The class paths and arguments of ``trainer.logger``, which may be one, several, a bool or None."""
    several = option if isinstance(option, list) else [option]
    return [logger for logger in several if isinstance(logger, Namespace)]


def _loggers_folder(run_dir: str, option: Any) -> str:
    """Where the loggers of ``trainer.logger`` write: the run folder, and no other place."""
    for logger in _loggers(option):
        own = signature(resolve_name(logger.class_path)).parameters.get("save_dir")
        given = logger.init_args.get("save_dir")
        if own and given not in (None, own.default, run_dir, at_home(run_dir)):
            raise UserError(
                f"trainer.logger has save_dir {given}: loggers write to the run folder, so leave it out and "
                "set --run_dir."
            )
    return at_home(run_dir)


def at_home(place: str) -> str:
    """The place with ~ as a shell has it, which a config does not pass through; else as it is."""
    return os.path.expanduser(place)  # noqa: PTH111  (a Path would change the text)


def _class_path(cls: type) -> dict[str, str]:
    return {"class_path": f"{cls.__module__}.{cls.__name__}"}


def _check_processes(trainer: Trainer) -> None:
    """Say on each node that it waits for the others.

    Raises:
        UserError: A launcher has started too few processes, or none, or too many, or the nodes could not find
            each other.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None:  # one device, one process
        if rank_zero_only.rank:
            set_here = [name for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
            without = " ".join(f"-u {name}" for name in (*set_here, "SLURM_NTASKS"))
            raise UserError(
                f"this is process {rank_zero_only.rank} of a launcher ({', '.join(set_here)}), and one "
                "device takes one process: set trainer.devices to the number of processes. If each is to be "
                f"a run of its own, with its own run_dir, start it with env {without}."
            )
        return
    nodes, devices = trainer.num_nodes, trainer.num_devices
    started = environment.world_size()
    if environment.creates_processes_externally and started != nodes * devices:
        raise UserError(
            f"{started} processes were started by the launcher, and trainer.num_nodes x trainer.devices is "
            f"{nodes * devices}: have srun (--nodes={nodes} --ntasks-per-node={devices}) or torchrun "
            f"(--nnodes={nodes} --nproc-per-node={devices}) start one for each device."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if nodes > 1 and missing and isinstance(environment, LightningEnvironment):
        raise UserError(
            f"trainer.num_nodes is {nodes}, and {missing[0]} is not set: start the program with "
            "torchrun or srun, or on each node with the MASTER_ADDR and MASTER_PORT of the first one, and "
            "NODE_RANK, which is 0 there."
        )
    if nodes > 1 and trainer.local_rank == 0:
        place = f"{environment.main_address}:{environment.main_port}"
        print(f"waiting for all {nodes} nodes at {place}", flush=True)
