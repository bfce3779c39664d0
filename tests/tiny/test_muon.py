"""Muon and AdamW behind one face: the same updates as each alone, one scheduler, one checkpoint."""

import copy

import pytest
import torch
from torch import nn

from emma_hf.tiny.muon import MuonWithAdamW


class Network(nn.Module):
    """Layers' matrices, and what is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(self.frozen(layer(hidden)))
        return self.head(hidden).square().sum()


@pytest.fixture
def network():
    torch.manual_seed(0)
    wrapped = nn.Module()
    wrapped.model = Network()
    return wrapped


def train(network, optimizer, steps, scheduler=None):
    for step in range(steps):
        network.model(torch.arange(5).roll(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def test_each_weight_gets_the_update_of_its_own_optimizer(network):
    other = copy.deepcopy(network)
    train(network, MuonWithAdamW(network, lr=0.01, adam_lr=0.02, weight_decay=0.1), 4)
    model = other.model
    matrices = [layer.weight for layer in model.layers]
    vectors = [layer.bias for layer in model.layers] + [model.head.bias]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = torch.optim.AdamW(
        [model.embedding.weight, model.head.weight], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)
    )
    plain = torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(4):
        model(torch.arange(5).roll(step)).backward()
        for optimizer in (muon, decayed, plain):
            optimizer.step()
            optimizer.zero_grad()
    for (name, weight), expected in zip(network.named_parameters(), other.parameters()):
        assert torch.equal(weight, expected), name


def test_a_scheduler_reaches_both(network):
    optimizer = MuonWithAdamW(network, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(network, optimizer, 2, scheduler)
    before = copy.deepcopy(network.state_dict())
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.0025] * 3
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(network, optimizer, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_it_goes_on_from_its_state_as_if_never_stopped(network):
    optimizer = MuonWithAdamW(network, lr=0.01)
    train(network, optimizer, 3)
    again = copy.deepcopy(network)
    resumed = MuonWithAdamW(again, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, 2)
    train(again, resumed, 2)
    for (name, weight), expected in zip(again.named_parameters(), network.parameters()):
        assert torch.equal(weight, expected), name


def test_a_stage_without_layers_is_adamw_alone(network):
    network.model.layers.requires_grad_(False)
    optimizer = MuonWithAdamW(network, lr=0.01)
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW]
    before = network.model.head.weight.clone()
    train(network, optimizer, 1)
    assert not torch.equal(before, network.model.head.weight)
