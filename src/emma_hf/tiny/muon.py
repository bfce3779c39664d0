"""Muon for the matrices of a transformer's layers and AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from torch import nn

# Embeddings, heads, norms and biases have no use for an update in which all directions are equally large.
LAYERS = ".layers."


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) and `torch.optim.AdamW` behind one face, which is what `Trainer` steps.

    A small transformer learns several times faster with it than with AdamW alone. Muon's updates are scaled to the
    size of AdamW's (arXiv 2502.16982), so that rates of the same size serve both.

    Args:
        model: its parameters that require gradients are trained; the two-dimensional ones of its layers by Muon.
        lr: rate of Muon.
        adam_lr: rate of AdamW. Default: the same.
        weight_decay: of all but vectors.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        adam_lr: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        matrices = [weight for name, weight in trained.items() if weight.ndim == 2 and LAYERS in name]
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in trained.values() if id(weight) not in chosen]
        groups = [
            {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": weight_decay},
            {"params": [weight for weight in others if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        adam_lr = lr if adam_lr is None else adam_lr
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([group for group in groups if group["params"]], lr=adam_lr, betas=betas)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on the groups and the state of the whole, so that a scheduler and a checkpoint reach them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of an optimizer of the same model."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


__all__ = ["MuonWithAdamW"]
