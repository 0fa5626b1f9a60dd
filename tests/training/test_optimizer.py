"""Weights after a step are those that torch's optimisers give by their formulas."""

import copy
from typing import Any

import pytest
import torch
from runs import noise

from cxrfast.config import TrainConfig
from cxrfast.models.classifier import Classifier
from cxrfast.training.optimizer import decay_groups, make_optimizer
from cxrfast.training.setup import make_config

RATE = 0.01


def config(**options: Any) -> TrainConfig:
    known = {"set_id": "a", "scale": 32, "labels": ("A",), "global_batch": 2, "micro_batch": 2, "learning_rate": RATE}
    return TrainConfig(**{**known, "arch": "shufflenet_v2_x0_5", **options})


@pytest.fixture(scope="module")
def model() -> Classifier:
    """A network with a gradient for each of its weights."""
    torch.manual_seed(0)
    model = Classifier("shufflenet_v2_x0_5", 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5  # else a bias of 0 has nothing that could decay
    model(noise(2, 32)).sum().backward()
    return model


def after_a_step(model: Classifier, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after one step of the optimiser of a configuration."""
    other = copy.deepcopy(model)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    make_optimizer(config(**options), other).step()
    return dict(other.named_parameters())


def adams_first_step(gradient: torch.Tensor) -> torch.Tensor:
    """Kingma and Ba 2015, algorithm 1: both moments are corrected to the gradient and its square."""
    return RATE * gradient / (gradient.abs() + 1e-8)


def test_adam_as_in_the_study_decays_nothing(model):
    for name, weight in after_a_step(model).items():
        before = model.get_parameter(name)
        torch.testing.assert_close(weight, before - adams_first_step(before.grad), rtol=1e-5, atol=1e-6)


def test_adamw_takes_the_decay_from_weights_of_two_or_more_dimensions(model):
    for name, weight in after_a_step(model, optimizer="adamw").items():
        before = model.get_parameter(name)
        left = before * (1 - RATE * 0.01) if before.ndim > 1 else before
        torch.testing.assert_close(weight, left - adams_first_step(before.grad), rtol=1e-6, atol=1e-7)


def test_adam_adds_a_decay_to_the_gradient(model):
    for name, weight in after_a_step(model, weight_decay=0.5).items():
        before = model.get_parameter(name)
        gradient = before.grad + 0.5 * before if before.ndim > 1 else before.grad
        torch.testing.assert_close(weight, before - adams_first_step(gradient), rtol=1e-5, atol=1e-6)


def test_every_weight_is_in_one_group_and_in_one_alone(model):
    for decay in (0.0, 0.1):
        given = [weight for group in decay_groups(model, decay) for weight in group["params"]]
        assert {id(weight) for weight in given} == {id(weight) for weight in model.parameters()}
        assert len(given) == len(list(model.parameters()))


def test_what_a_network_exempts_is_not_decayed(model):
    other = copy.deepcopy(model)
    name = "conv1.0.weight"
    other.net.no_weight_decay = lambda: {name}
    decayed, _ = decay_groups(other, 0.1)
    assert id(other.net.get_parameter(name)) not in {id(weight) for weight in decayed["params"]}
    assert len(decayed["params"]) + 1 == len(decay_groups(model, 0.1)[0]["params"])


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, None),
        ({"weight_decay": 0.0}, None),
        ({"weight_decay": 0.1}, 0.1),
        ({"optimizer": "adamw"}, 0.01),
        ({"optimizer": "adamw", "weight_decay": 0.0}, 0.0),
    ],
)
def test_a_run_stores_the_decay_that_it_uses(tiny_set, given, stored):
    made = make_config(tiny_set, 32, device="cpu", **given)
    assert made.weight_decay == stored
    assert made.decay == (stored or 0.0)
    if stored is None:
        assert made.hash == make_config(tiny_set, 32, device="cpu").hash
