"""Which checkpoints are complete: runs that were killed resume from the last one."""

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..model.errors_emma import EmmaError

logger = logging.get_logger(__name__)

# The last file that `Trainer` writes into a checkpoint.
TRAINER_STATE = "trainer_state.json"


class IncompleteCheckpointCallback(TrainerCallback, ExportableState):
    """Let `Trainer` resume from the last complete checkpoint.

    `Trainer` writes a checkpoint in place and resumes from the one of the highest step, complete or not. A trainer
    with this callback renames incomplete checkpoints in its output folder to `_incomplete-checkpoint-…`, a name that is
    not uploaded, when it is created, so that `trainer.train(resume_from_checkpoint=True)` finds the last complete one.
    A script that names the checkpoint itself calls [`last_complete_checkpoint`].

    Args:
        stage: name of what is trained, for [`stage_of_checkpoint`].

    Raises:
        EmmaError: from the trainer, with `save_only_model`.
    """

    def __init__(self, stage: str | None = None) -> None:
        self.stage, self.processes = stage, 1

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves in a checkpoint: the stage, and how many processes' random states it must hold."""
        return {"args": {"stage": self.stage}, "attributes": {"processes": self.processes}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_only_model and args.save_strategy != "no":
            raise EmmaError(
                "A run goes on from a checkpoint with its optimizer, and `save_only_model` leaves that out. Leave the "
                'option out, or save no checkpoints (`save_strategy="no"`).'
            )
        with args.main_process_first(local=args.save_on_each_node, desc="looking for incomplete checkpoints"):
            if args.should_save:
                for folder, reason in incomplete_checkpoints(args.output_dir):
                    _rename_incomplete(folder, reason)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not earlier: a resumed `Trainer` creates this callback again from the state in the checkpoint.
        self.processes = args.world_size


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Path of the complete checkpoint of the highest step in `output_dir`, or None."""
    complete = [folder for folder in _checkpoints(output_dir) if why_incomplete(folder) is None]
    return str(complete[-1]) if complete else None


def stage_of_checkpoint(folder: str | Path) -> str | None:
    """The stage that [`IncompleteCheckpointCallback`] noted in a checkpoint, or None."""
    return _callback_state(Path(folder)).get("args", {}).get("stage")


def _callback_state(folder: Path) -> dict[str, Any]:
    callbacks = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8")).get("stateful_callbacks", {})
    return callbacks.get(IncompleteCheckpointCallback.__name__, {})


def incomplete_checkpoints(output_dir: str | Path) -> list[tuple[Path, str]]:
    """Checkpoints in `output_dir` that cannot be resumed from, each with the reason."""
    reasons = [(folder, why_incomplete(folder)) for folder in _checkpoints(output_dir)]
    return [(folder, reason) for folder, reason in reasons if reason is not None]


def _checkpoints(output_dir: str | Path) -> list[Path]:
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in folders if path.name.partition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))


def why_incomplete(folder: Path) -> str | None:
    """Why a checkpoint is incomplete, or None."""
    # Its last file shows that the others were written; after a power failure they may still be truncated.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    broken = [path for path in [folder / TRAINER_STATE, *files] if not _is_readable(path)]
    if broken:
        return f"{broken[0].relative_to(folder)} is missing or cut off"
    # A file of `Trainer`, FSDP's file or folder, or DeepSpeed's folder.
    if not any(folder.glob("optimizer*")) and not any(folder.glob("global_step*")):
        return "it holds no state of the optimizer"
    processes = _callback_state(folder).get("attributes", {}).get("processes", 1)
    # Other processes may still have been writing when the first one had finished.
    states = len(list(folder.glob("rng_state_*.pth")))
    if processes > 1 and states < processes:
        return f"it holds the random states of {states} of {processes} processes"
    return None


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            # torch writes zip files, and the index of a zip file at its end. Nothing is unpickled here.
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("/data.pkl") for name in archive.namelist())
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        return path.is_file()
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def _rename_incomplete(folder: Path, reason: str) -> None:
    target = folder.with_name(f"_incomplete-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"_incomplete-{folder.name}-{number}")
    folder.rename(target)
    logger.warning(f"{folder} was not written to its end ({reason}); renamed to {target.name}. Delete it at will.")
