"""The command line: LightningCLI for training, and plain functions for what needs no model."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import rft_lightning.datamodules  # noqa: F401
from rft_lightning import __version__
from rft_lightning.baselines import BaselineModule
from rft_lightning.callbacks import metric_callbacks
from rft_lightning.config_files import install_loader
from rft_lightning.datamodules import RFTDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError, RFTError
from rft_lightning.export import export
from rft_lightning.failures import remedy
from rft_lightning.grpo import GRPOModule  # noqa: F401
from rft_lightning.interruption import Interrupted
from rft_lightning.prepare import named_errors, run_prepare, settle_processor
from rft_lightning.score import run_score
from rft_lightning.sft import SFTModule  # noqa: F401
from rft_lightning.trainer import FSDP_MESSAGE, RFTTrainer


class RFTParser(LightningArgumentParser):
    """Lightning's, with a short error where something to be called (a reward) cannot be imported or made."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Of the tree of types that were tried, the reason alone."""
        # Parsers of parts, which do not exit, keep the tree: it is put together from their errors.
        reasons = re.findall(r"expects a function or a callable class: (?!Parser key)(.+)", message)
        if reasons and self.exit_on_error:
            message = reasons[0]
            if message.startswith("No module named"):
                message += "\nModules are looked for among the installed packages and in the working directory."
        super().error(message, ex)


class RFTCLI(LightningCLI):
    """fit, validate, test, predict, evaluate and rollout."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, evaluate and rollout."""
        own = ("evaluate", "rollout")
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in own}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One folder for all that a run writes."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            help="Folder of the run, in place of trainer.default_root_dir, the save_dir of all loggers and the "
            "output_dir of callbacks: logs, checkpoints and the tuned policy lie below it.",
        )

    def before_instantiate_classes(self) -> None:
        """Settle what the Trainer would refuse in words that do not help."""
        config = self.config[self.config.subcommand]
        if config.run_dir is not None:
            self._settle_folder(config.trainer, config.run_dir)
        checkpoint = config.get("ckpt_path")
        # "best", "last", "hpc" and registries are Lightning's own words.
        if checkpoint and Path(checkpoint).suffix and not Path(checkpoint).exists():
            raise CheckpointError(f"No checkpoint at {checkpoint}; expected a .ckpt file that `fit` wrote.")
        trainer = config.trainer
        strategy = trainer.strategy
        name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
        if name in ("fsdp", "fsdp_cpu_offload") or name.endswith("FSDPStrategy"):
            raise ConfigConflictError(FSDP_MESSAGE)
        if trainer.enable_progress_bar is False and trainer.callbacks:
            trainer.callbacks = [c for c in trainer.callbacks if not c.class_path.endswith("ProgressBar")]

    @staticmethod
    def _settle_folder(trainer: Any, folder: str) -> None:
        trainer.default_root_dir = folder
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if hasattr(logger, "init_args") and "save_dir" in logger.init_args:
                logger.init_args.save_dir = folder
        # The policy lies beside the logs then, where HFExport puts it unless it is told otherwise.
        places = {"HFExport": None, "BeforeAfter": folder, "PredictionWriter": None}
        for callback in trainer.callbacks or ():
            name = callback.class_path.rsplit(".", 1)[-1]
            if name in places and "init_args" in callback and callback.init_args.get("output_dir") is not None:
                callback.init_args.output_dir = places[name]

    def instantiate_classes(self) -> None:
        """Lightning's, with the named errors of constructors."""
        with named_errors():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """The policy's checkpoint also sets up the prompts; another system takes the samples in its own way."""
        if isinstance(self.model, BaselineModule):
            self.datamodule.collate = self.model.encoder_for(self.datamodule)
        else:
            settle_processor(self.datamodule, self.model.checkpoint)


def configs(copy: str | None = None) -> None:
    """List the configuration files and job scripts that come with the package, or copy them to a folder.

    Args:
        copy: folder to copy them to; files that exist there are left alone and named.
    """
    root = Path(str(resources.files("rft_lightning.configs")))
    found = (path for path in root.rglob("*") if path.suffix in (".yaml", ".sh", ".sbatch"))
    files = sorted(path.relative_to(root) for path in found)
    if copy is None:
        for file in files:
            lines = (root / file).read_text(encoding="utf-8").splitlines()
            first = lines[lines[0].startswith("#!")]
            print(f"{file!s:36} {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
        print(f"\nThey lie in {root}; `rft configs --copy FOLDER` copies them.")
        return
    for file in files:
        target = Path(copy) / file
        if target.exists():
            print(f"left alone, exists: {target}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target)
        print(f"copied: {target}")


COMMANDS: dict[str, Callable[..., None]] = {"configs": configs, "export": export}
# What `--data CLASS` keeps of a file's `data` block: how prompts are made and batched, not whose data it is.
SHARED_DATA_ARGUMENTS = {*inspect.signature(RFTDataModule).parameters, "task"}


def run(args: ArgsType = None) -> Any:
    """Parse and run; named errors are raised."""
    words = sys.argv[1:] if args is None else args
    here = os.getcwd()
    if here not in sys.path:
        # The working directory, for the user's own rewards: a console script does not have it. Last, so that none of
        # the folders there hides a package; by name, since a file's own folder is entered while it is read.
        sys.path.append(here)
    if isinstance(words, list) and words and words[0] in COMMANDS:
        from jsonargparse import auto_cli

        return auto_cli(COMMANDS[words[0]], args=words[1:], prog=f"rft {words[0]}")
    if isinstance(words, list) and words[:1] == ["score"]:
        return run_score(words[1:], metric_callbacks)
    if isinstance(words, list) and words[:1] == ["table"]:
        from rft_lightning.report.tables import run_table

        return run_table(words[1:])
    install_loader(words if isinstance(words, list) else (), SHARED_DATA_ARGUMENTS)
    if isinstance(words, list) and words[:1] == ["prepare"]:
        return run_prepare(words[1:], RFTDataModule)
    return RFTCLI(
        LightningModule,
        RFTDataModule,
        trainer_class=RFTTrainer,
        parser_class=RFTParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "version": f"rft_lightning {__version__}",
            "epilog": "Further commands: configs (list and copy the shipped configuration files), export (a checkpoint "
            "as a Hugging Face folder), prepare (check, summarise and preview the data of a configuration), score "
            "(average precision of a results file, all metrics of a predictions file), table (the paper's tables: the "
            "runs that fill them, and what was measured beside what was published).",
            # The generated usage is a hundred lines, which would bury the error below it.
            **{name: {"usage": f"rft {name} --config FILE [options]"} for name in RFTCLI.subcommands()},
        },
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """The command line. Given `args`, named errors are raised; from a terminal they are one line and exit status 2.

    A run that was interrupted and saved has exit status 75 (EX_TEMPFAIL) and says in its last line how to go on.
    """
    try:
        run(args)
    except Interrupted as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"rft: {stop}", file=sys.stderr)
        raise
    except RuntimeError as error:
        advice = remedy(error)
        if advice is not None:
            error.add_note(f"rft: {advice}")
        raise
    except RFTError as error:
        if args is not None:
            raise
        print(f"rft: {type(error).__name__}: {_message(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _message(error: RFTError) -> str:
    """The text of an error; of one from a DataLoader worker, which arrives as a whole traceback, its last part."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if text.startswith("Caught ") else text
