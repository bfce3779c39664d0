"""Fine-tuning: stages, `Trainer` extensions, checkpoints."""

from .callbacks import SampleAnswersCallback
from .checkpoints import IncompleteCheckpointCallback, last_complete_checkpoint
from .plots import plot_loss
from .sampler import ModalityLengthSampler
from .stages import LORA_TARGETS, STAGES, Stage, parameter_groups, prepare, stage_of
from .trainer import EmmaTrainer

__all__ = [
    "LORA_TARGETS",
    "STAGES",
    "EmmaTrainer",
    "IncompleteCheckpointCallback",
    "ModalityLengthSampler",
    "SampleAnswersCallback",
    "Stage",
    "last_complete_checkpoint",
    "parameter_groups",
    "plot_loss",
    "prepare",
    "stage_of",
]
