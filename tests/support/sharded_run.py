"""`emma-hf train` by FSDP2 or ZeRO-3 without a GPU, for `test_many_processes.py`.

Both engines run on gloo; it is accelerate that looks for them only where it finds an accelerator.
"""

import sys

from accelerate.state import DistributedType, PartialState

from emma_hf.training.finetune import main

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
main(sys.argv[1:])
