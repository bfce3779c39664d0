"""Where the kernels run in tests: on CUDA, or in Triton's interpreter where `TRITON_INTERPRET=1` is set."""

import pytest
import torch

from emma_hf.model import fused_alignment as fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and fused.triton is not None else "cpu"
needs_kernels = pytest.mark.skipif(
    fused.triton is None or not (CUDA or fused.INTERPRETED),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1 (make test-kernels)",
)
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device and triton")
