"""`examples/finetune.py` by FSDP2 or ZeRO-3 without a GPU, for `test_many_processes.py`.

Both engines run on gloo; it is accelerate that looks for them only where it finds an accelerator.
"""

import runpy
from pathlib import Path

from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
runpy.run_path(str(Path(__file__).parents[2] / "examples" / "finetune.py"), run_name="__main__")
