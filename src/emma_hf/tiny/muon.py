"""One optimizer of two: Muon for the matrices of a transformer's layers and AdamW for everything else."""

from typing import Any

import torch
from torch import nn

# Muon makes all directions of an update equally large, which suits neither embeddings and heads nor vectors.
LAYERS = ".layers."


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) and `torch.optim.AdamW` as the one optimizer that `Trainer` expects.

    A small transformer learns several times faster with it than with AdamW alone. Muon's updates are scaled to the
    size of AdamW's (arXiv 2502.16982), so that similar learning rates suit both.

    Args:
        model: model whose parameters that require gradients are trained, the matrices of its layers by Muon.
        lr: learning rate of Muon.
        adam_lr: learning rate of AdamW. Default: `lr`.
        weight_decay: weight decay of all parameters but vectors.
        betas: betas of AdamW.
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
        matrix_ids = {id(weight) for weight in matrices}
        others = [weight for weight in trained.values() if id(weight) not in matrix_ids]
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
        self._share_groups_and_state()

    def _share_groups_and_state(self) -> None:
        """Give both optimizers the groups and the state of this one, so that schedulers and checkpoints reach them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of an optimizer of the same model."""
        super().load_state_dict(state_dict)
        self._share_groups_and_state()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


__all__ = ["MuonWithAdamW"]
