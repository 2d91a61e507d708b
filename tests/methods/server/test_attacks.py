"""Attacks by their known answers, and noise for privacy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_sketch import ConfigurationError
from hvd_sketch.methods.server import LocalNoise
from hvd_sketch.methods.server.attacks import (
    ALittleIsEnough,
    BitFlip,
    Gaussian,
    InnerProduct,
    NotANumber,
    RandomDirection,
    Replay,
    SignFlip,
    Zero,
    flip_labels,
    little_enough,
)
from tests.methods.server.support import vector

HONEST = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 4.0]], dtype=torch.float64)
OWN = vector(3.0, 4.0)


def test_known_answers_of_the_omniscient_ones() -> None:
    assert ALittleIsEnough(lambda: HONEST, 1.0)(OWN).tolist() == pytest.approx([1.382, 2.586], abs=5e-4)
    assert InnerProduct(lambda: HONEST, 0.5)(OWN).tolist() == [-1.25, -2.0]
    assert BitFlip(lambda: HONEST)(OWN).tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("workers", "hostile", "z"), [(10, 4, 0.4307), (20, 8, 0.6745), (50, 24, 1.4261), (8, 2, 0.0)]
)
def test_how_little_is_enough(workers: int, hostile: int, z: float) -> None:
    assert little_enough(workers, hostile) == pytest.approx(z, abs=5e-5)


def test_what_the_local_ones_send() -> None:
    assert SignFlip(10.0)(OWN).tolist() == [-30.0, -40.0]
    assert Zero()(OWN).tolist() == [0.0, 0.0]
    assert NotANumber()(OWN).isnan().all()
    assert torch.linalg.vector_norm(RandomDirection(8.0)(OWN)) == pytest.approx(40.0)
    noise = Gaussian(200.0)(torch.zeros(10_000))
    assert float(noise.std()) == pytest.approx(200.0, rel=0.03)
    assert flip_labels(torch.tensor([0, 3, 9]), 10).tolist() == [9, 6, 0]


def test_a_replay_is_honest_until_it_is_trusted() -> None:
    attack = Replay(after=2)
    assert [attack(vector(float(step))).tolist() for step in range(5)] == [[0.0], [1.0], [0.0], [0.0], [0.0]]


def test_random_ones_are_the_same_again_from_a_seed() -> None:
    for make in (Gaussian, RandomDirection):
        assert torch.equal(make(seed=4)(OWN), make(seed=4)(OWN))
        assert not torch.equal(make(seed=4)(OWN), make(seed=5)(OWN))


def test_local_noise_clips_and_hides_the_direction_as_told() -> None:
    noise, size = LocalNoise(clip=1.0, sigma=0.01, seed=0), 10**6
    update = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-2
    sent = noise(update.clone())
    cosine = float(torch.dot(sent, update) / torch.linalg.vector_norm(sent) / torch.linalg.vector_norm(update))
    assert cosine == pytest.approx(1.0 / math.sqrt(1.0 + size * 0.01**2), rel=0.02)  # a tenth
    assert float((sent - update / torch.linalg.vector_norm(update)).std()) == pytest.approx(0.01, rel=0.01)
    assert noise.pushes == 1


def test_local_noise_leaves_a_short_update_its_length() -> None:
    assert LocalNoise(clip=10.0, sigma=0.0)(OWN.clone()).tolist() == [3.0, 4.0]
    assert LocalNoise(clip=1.0, sigma=0.0)(OWN.clone()).tolist() == pytest.approx([0.6, 0.8])
    assert LocalNoise(clip=1.0, sigma=0.0)(vector(0.0)).tolist() == [0.0]


def test_local_noise_differs_from_worker_to_worker() -> None:
    assert not torch.equal(LocalNoise(1.0, 1.0)(vector(0.0)), LocalNoise(1.0, 1.0)(vector(0.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignFlip(0.0), "SignFlip: scale must be above 0"),
        (lambda: SignFlip(-1.0), "SignFlip: scale must be above 0 and finite, got -1.0"),
        (lambda: Gaussian(-1.0), "Gaussian: sigma must be at least 0"),
        (lambda: Gaussian(math.inf), "Gaussian: sigma must be at least 0 and finite"),
        (lambda: RandomDirection(0.0), "RandomDirection: scale must be above 0"),
        (lambda: Replay(after=0), "Replay: after must be at least 1 update"),
        (lambda: BitFlip(HONEST), "BitFlip: honest must be a function"),  # type: ignore[arg-type]
        (lambda: InnerProduct(lambda: HONEST, 0.0), "InnerProduct: epsilon must be above 0"),
        (lambda: ALittleIsEnough(lambda: HONEST, math.inf), "ALittleIsEnough: z must be finite"),
        (lambda: flip_labels(torch.tensor([0, 1]), 1), "flip_labels: classes must be at least 2"),
        (lambda: flip_labels(torch.tensor([0, 10]), 10), "labels must be from 0 to 9, got 0 to 10"),
        (lambda: flip_labels(torch.tensor([-1, 3]), 10), "labels must be from 0 to 9, got -1 to 3"),
        (lambda: flip_labels(torch.tensor([0.5]), 10), "labels must be a tensor of whole numbers"),
        (lambda: little_enough(2, 1), "little_enough: workers must be at least 3"),
        (lambda: little_enough(10, 6), "little_enough: hostile must be from 0 to 5, half of all, got 6"),
        (lambda: little_enough(10, -1), "little_enough: hostile must be from 0 to 5"),
    ],
)
def test_attacks_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("honest", [HONEST[:0], HONEST[0], HONEST[:, :1], HONEST.tolist(), None], ids=repr)
def test_honest_updates_that_are_none_are_told(honest: Any) -> None:
    """Of no worker, of one without the dimension of workers, of another model, and no tensor."""
    with pytest.raises(ConfigurationError, match=r"BitFlip: honest must return updates as a tensor \(workers, 2\)"):
        BitFlip(lambda: honest)(OWN)


@pytest.mark.parametrize(
    ("clip", "sigma", "name"),
    [(0.0, 1.0, "clip"), (math.inf, 0.0, "clip"), (1.0, -1.0, "sigma"), (1.0, math.inf, "sigma")],
)
def test_bad_settings_are_refused(clip: float, sigma: float, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"LocalNoise: {name}"):
        LocalNoise(clip, sigma)
