"""Where weights lie, whether they need gradients, which processes wait for each other, what need not be done twice."""

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


def distinct_rows(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The different rows of `ids` (rows, tokens), and for each row which of them it is, (rows,).

    Where no row repeats, or nothing can be known of them (compiled, on the meta device), `ids` and None.
    """
    if torch.compiler.is_compiling() or ids.is_meta or ids.shape[0] < 2:
        return ids, None
    distinct, places = torch.unique(ids, dim=0, return_inverse=True)
    return (distinct, places) if len(distinct) < len(ids) else (ids, None)


def is_hooked(module: nn.Module) -> bool:
    """Whether something else happens when `module` is called. accelerate puts a `forward` on the object itself."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is what it seems, so that its weight can be used directly.

    One that is quantized, adapted, offloaded or spread over processes must be called.
    """
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not is_hooked(linear)


__all__ = ["device_of", "distinct_rows", "is_hooked", "is_plain", "needs_grad", "steps_together"]
