"""Train, be killed, and go on: the script that `training/test_checkpoints.py` runs.

    python killed_runs.py KIND MODEL ROWS IMAGES OUTPUT STEPS SEED KILLS

KIND is `plain` (a plain `Trainer` with the callback) or `command` (`emma-hf train`). Each kill of the list in JSON is a
number of seconds after which the process dies, or the name of a checkpoint file in whose write it dies; after them one
run goes to its end. Every run is a fork of a process that has imported everything and computed nothing. Prints, as JSON,
how each run ended and the step that it had begun with.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.cli import main
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import prepare
from emma_hf.training.checkpoints import IncompleteCheckpointCallback


class Began(TrainerCallback):
    """Notes the first step; starts the clock of a process that will be killed."""

    kill: float | str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        (self.folder / "began").write_text(str(state.global_step))
        if isinstance(self.kill, float):
            # A process of its own: a thread would only strike where Python lets it run.
            subprocess.Popen(["sh", "-c", f"sleep {self.kill}; kill -9 {os.getpid()}"])


def die_inside(name: str) -> None:
    """Kill this process at its second checkpoint, where half of the file `name` is written."""
    save = Trainer._save_checkpoint
    saved = []

    def watched(self, *args, **kwargs):
        saved.append(self.state.global_step)
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / name

        def after_each_call(frame, event, argument):
            # Whatever writes the file, in Python, C++ or Rust, is called from Python.
            if event == "c_return" and target.exists() and target.stat().st_size:
                os.truncate(target, target.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        if len(saved) == 2:
            sys.setprofile(after_each_call)
        try:
            return save(self, *args, **kwargs)
        finally:
            sys.setprofile(None)

    Trainer._save_checkpoint = watched


def plain(model: str, rows: str, images: str, output: Path, steps: int, seed: int) -> None:
    processor = EmmaProcessor.from_pretrained(model)
    trainer = Trainer(
        model=prepare(EmmaForConditionalGeneration.from_pretrained(model), "finetune"),
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            save_steps=1,
            save_total_limit=2,
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=ConversationDataset(rows, processor, images),
        data_collator=DataCollator(processor),
        processing_class=processor,
        callbacks=[IncompleteCheckpointCallback(), Began(output)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    trainer.save_model()
    trainer.save_state()


def command(model: str, rows: str, images: str, output: Path, steps: int, seed: int) -> None:
    begin = Trainer._inner_training_loop

    def noted(self, *args, **kwargs):
        self.add_callback(Began(output))
        return begin(self, *args, **kwargs)

    Trainer._inner_training_loop = noted
    # The adapter's dropout draws random numbers at each step, which a resumed run must continue.
    options = f"--model {model} --train_data {rows} --image_folder {images} --output_dir {output} --stage lora"
    options += " --lora_r 4 --lora_alpha 8 --lora_dropout 0.3 --global_batch_size 3 --per_device_train_batch_size 3"
    options += f" --max_steps {steps} --save_steps 1 --save_strategy steps --logging_steps 1 --seed {seed} --use_cpu"
    if main(["train", *options.split()]):
        raise SystemExit(1)


def run(kind: str, kill: float | str | None, output: Path, *arguments) -> dict:
    """Train in a fork; how it ended, and from which step it went on."""
    (output / "began").unlink(missing_ok=True)
    child = os.fork()
    if not child:
        log = os.open(output / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            Began.kill = kill
            if isinstance(kill, str):
                die_inside(kill)
            {"plain": plain, "command": command}[kind](*arguments)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    began = output / "began"
    return {
        "kill": kill,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "began": int(began.read_text()) if began.exists() else None,
    }


if __name__ == "__main__":
    kind, model, rows, images, output, steps, seed, kills = sys.argv[1:]
    arguments = (model, rows, images, Path(output), int(steps), int(seed))
    runs = [run(kind, kill, Path(output), *arguments) for kill in [*json.loads(kills), None]]
    print(json.dumps(runs))
