"""Where weights lie, whether they need gradients, and which processes wait for each other."""

import torch
from torch import nn


def device_of(weight: torch.Tensor, inputs: torch.Tensor) -> torch.device:
    """Device on which a module with that weight runs."""
    # An offloaded weight lives on the meta device until its module runs; accelerate then moves the inputs itself.
    return inputs.device if weight.is_meta else weight.device


def needs_grad(tower: nn.Module, inputs: torch.Tensor | None = None) -> bool:
    """Frozen towers keep no activations: the graph starts behind them."""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad for p in tower.parameters()) or (inputs is not None and inputs.requires_grad)


def steps_together(model: nn.Module) -> bool:
    """Whether other processes wait in this forward pass for each weight of `model`.

    In training they average gradients (DDP). Where the weights themselves are spread (FSDP, ZeRO-3) they gather each
    of them, outside training too.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    # FSDP2 shards are DTensors, whose module is not imported for a look at them; ZeRO-3 gives its shards an id.
    spread = (hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
    return model.training or any(spread)


__all__ = ["device_of", "needs_grad", "steps_together"]
