"""EMMA (Efficient Multi-Modal Adaptation, arXiv 2410.02080) for Transformers 4.57 and 5."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
# Folder of the trained model that ships with the package: it answers questions about the images of `emma_hf.tiny`.
EMMA_TINY = Path(__file__).parent / "tiny" / "emma-tiny"

__all__ = [
    "EMMA_TINY",
    "AutoModelForVision2Seq",
    "EmmaConfig",
    "EmmaError",
    "EmmaForConditionalGeneration",
    "EmmaImageProcessor",
    "EmmaModel",
    "EmmaPreTrainedModel",
    "EmmaProcessor",
    "HubError",
]


def _runs_the_command() -> bool:
    """Whether this process is the `emma-hf` command, by the name of its script or as `python -m emma_hf`."""
    if sys.argv[:1] == ["-m"]:
        # While Python imports the module that `-m` names, "-m" stands for it before its arguments in `sys.argv`.
        return sys.orig_argv[-len(sys.argv)] == __name__
    return os.path.basename("".join(sys.argv[:1])).removesuffix(".exe") == "emma-hf"


if TYPE_CHECKING or not _runs_the_command():
    # Registers the Auto classes: they know EMMA from `import emma_hf` on.
    from .auto_classes import (
        AutoModelForVision2Seq,
        EmmaConfig,
        EmmaError,
        EmmaForConditionalGeneration,
        EmmaImageProcessor,
        EmmaModel,
        EmmaPreTrainedModel,
        EmmaProcessor,
        HubError,
    )
else:
    # Importing torch and Transformers takes seconds: the command prints its help and finds wrong arguments without
    # them, and imports `auto_classes` before it runs a command. A process that is taken for a script imports them at
    # once, which is slower and never wrong.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import auto_classes

        return getattr(auto_classes, name)
