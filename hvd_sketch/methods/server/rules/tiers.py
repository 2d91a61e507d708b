"""The server's part of FedAT: rounds within tiers of equal speed, and a mean over the tiers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any, Literal, TypedDict

from torch import Tensor

from hvd_sketch.methods.server.rules.base import Push, Rule, check
from hvd_sketch.methods.server.validation import Served
from hvd_sketch.saved import Form
from hvd_sketch.settings import given_numbers

Weights = Literal["mirror", "uniform", "samples"]

_SMOOTHING = 0.3  # of a new latency in the moving average


class TierOptions(TypedDict, total=False):
    """Keywords of `Tiers`."""

    clients: int | None
    weights: Weights
    published: bool
    retier: int | None
    forget: int
    seed: int


class Tiers(Rule):
    """With w_m the model of tier m = 1 … M, fastest first, T_m its rounds, n_k the samples of worker k::

        a tier's round   w_m <- sum of n_k v_k / sum of n_k over those asked,   T_m <- T_m + 1
        then             x <- sum of a_m w_m

    where v_k is the model that worker k arrived at. See `hvd_sketch.FedAT`, which explains the settings.
    """

    needs_base = True

    @given_numbers
    def __init__(
        self,
        tiers: int | Sequence[Sequence[int]],
        *,
        clients: int | None = None,
        weights: Weights = "mirror",
        published: bool = False,
        retier: int | None = None,
        forget: int = 30,
        seed: int = 0,
    ) -> None:
        check("FedAT", tiers=(_are_tiers(tiers), "at least 1, or the ranks of each tier", tiers))
        count = tiers if isinstance(tiers, int) else len(tiers)
        check(
            "FedAT",
            clients=(clients is None or clients >= 1, "at least 1 or None", clients),
            weights=(weights in ("mirror", "uniform", "samples"), "mirror, uniform or samples", weights),
            published=(not published or weights == "mirror", "False unless weights='mirror'", published),
            retier=(retier is None or retier >= 1, "at least 1 round or None", retier),
            forget=(forget >= 1, "at least 1 round", forget),
        )
        self._count, self._clients, self._mode, self._published = count, clients, weights, published
        self._retier, self._forget = retier, forget
        self._given = None if isinstance(tiers, int) else [list(tier) for tier in tiers]
        self._random = random.Random(seed)
        self.rounds = [0] * count
        self.tier_of: dict[int, int] = {}
        self._latencies: dict[int, float] = {}
        self._asked: list[set[int]] = [set() for _ in range(count)]
        self._models: list[Tensor] = []
        self._last_report = [0] * count
        self._turn_of = 0
        self._present: AbstractSet[int] = frozenset()

    def start(self, served: Served) -> None:
        super().start(served)
        workers, given = served.workers, self._given
        check("FedAT", tiers=(self._count <= len(workers), f"at most the {len(workers)} workers", self._count))
        if given is not None:
            named = sorted(worker for tier in given for worker in tier)
            check("FedAT", tiers=(named == workers and all(given), f"a partition of {workers}", given))
            self._arrange(given)
            self._asked = [set(tier) for tier in given]

    def turn(self, waiting: Mapping[int, Push], present: AbstractSet[int]) -> list[int] | None:
        """The first tier whose asked workers have all answered; those that are lost are not waited for.

        Before there are tiers, all workers' first answers are awaited. An empty list: all that were asked are lost.
        """
        self._present = frozenset(present)
        if not self.tier_of and waiting and present <= waiting.keys():
            self._profile(waiting)
        for number, asked in enumerate(self._asked):
            expected = asked & (present | waiting.keys())
            if asked and expected <= waiting.keys():
                self._turn_of, self._asked[number] = number, set()
                for worker in expected:
                    self._note_latency(worker, waiting[worker].seconds)
                return sorted(expected)
        return None

    def apply(self, model: Tensor, pushes: Sequence[Push]) -> list[bool]:
        number, samples = self._turn_of, [self._served.samples[push.worker] for push in pushes]
        if not self._models:
            self._models = [model.clone() for _ in range(self._count)]
        mean = self._models[number].zero_()
        for push, count in zip(pushes, samples, strict=True):
            assert push.base is not None
            mean.add_(push.base - push.change, alpha=count / sum(samples))
        self.rounds[number] += 1
        self._last_report[number] = sum(self.rounds)
        model.zero_()
        for weight, tier in zip(self.weights(), self._models, strict=True):
            model.add_(tier, alpha=weight)
        due = self._retier is not None and sum(self.rounds) % self._retier == 0
        if due and self._latencies.keys() >= self._present:
            self._arrange(self._by_latency())
        return [True] * len(pushes)

    def answers(self, workers: Sequence[int], present: AbstractSet[int]) -> Sequence[int]:
        """The tier whose turn it was, and any that had nobody to ask, go on with some workers, drawn at random."""
        busy = set().union(*self._asked)
        begin = [number for number in range(self._count) if not self._asked[number]]
        for number in begin:
            idle = sorted(self._members(number) & present - busy)
            few = idle if self._clients is None else self._random.sample(idle, min(self._clients, len(idle)))
            self._asked[number] = set(few)
        return sorted(set().union(*(self._asked[number] for number in begin)))

    def enter(self, worker: int, *, fresh: bool) -> None:
        """Who comes late belongs to the slowest tier; an answer of who was lost counts in its tier's present round."""
        if self.tier_of:
            self._asked[self.tier_of.setdefault(worker, self._count - 1)].add(worker)

    def weights(self) -> list[float]:
        """a_m of the tiers, fastest first; they sum to 1 once a tier has reported."""
        counted = [m for m in range(self._count) if self._published or (self.rounds[m] and not self._is_forgotten(m))]
        if self._mode == "mirror":
            shares = [self.rounds[m] for m in reversed(counted)]
        elif self._mode == "uniform":
            shares = [1] * len(counted)
        else:
            shares = [sum(self._served.samples[worker] for worker in self._members(m)) for m in counted]
            shares = shares if any(shares) else [1] * len(counted)
        weights, total = [0.0] * self._count, sum(shares)
        for m, share in zip(counted, shares, strict=True):
            weights[m] = share / total if total else 0.0
        return weights

    def _is_forgotten(self, number: int) -> bool:
        alone = not self._members(number) & self._present
        return alone and sum(self.rounds) - self._last_report[number] > self._forget

    def _members(self, number: int) -> set[int]:
        return {worker for worker, tier in self.tier_of.items() if tier == number}

    def _profile(self, waiting: Mapping[int, Push]) -> None:
        self._latencies = {worker: push.seconds for worker, push in waiting.items()}
        self._arrange(self._by_latency())
        self._asked = [self._members(number) & waiting.keys() for number in range(self._count)]

    def _by_latency(self) -> list[list[int]]:
        """All workers that have answered, fastest first, in parts of about the same size."""
        order = sorted(self._latencies, key=lambda worker: (self._latencies[worker], worker))
        cuts = [len(order) * number // self._count for number in range(self._count + 1)]
        return [order[start:stop] for start, stop in pairwise(cuts)]

    def _arrange(self, tiers: Sequence[Sequence[int]]) -> None:
        self.tier_of |= {worker: number for number, tier in enumerate(tiers) for worker in tier}

    def _note_latency(self, worker: int, seconds: float) -> None:
        before = self._latencies.get(worker, seconds)
        self._latencies[worker] = before + _SMOOTHING * (seconds - before)

    def state_dict(self) -> dict[str, Any]:
        return {
            "models": [model.clone() for model in self._models],
            "rounds": list(self.rounds),
            "last_report": list(self._last_report),
            "tier_of": dict(self.tier_of),
            "latencies": dict(self._latencies),
            "random": list(self._random.getstate()[1]),
        }

    def state_form(self) -> dict[str, Form]:
        count = self._count
        return {
            "models": object,
            "rounds": [int] * count,
            "last_report": [int] * count,
            "tier_of": object,
            "latencies": object,
            "random": [int] * len(self._random.getstate()[1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All workers are asked anew."""
        self._models = [model.clone() for model in state["models"]]
        self.rounds, self._last_report = list(state["rounds"]), list(state["last_report"])
        self.tier_of, self._latencies = dict(state["tier_of"]), dict(state["latencies"])
        self._random.setstate((3, tuple(state["random"]), None))
        self._asked = [self._members(number) for number in range(self._count)]


def _are_tiers(tiers: Any) -> bool:
    """Whether it is a number of tiers, or the ranks of each."""
    if isinstance(tiers, int):
        return tiers >= 1
    lists = isinstance(tiers, Sequence) and len(tiers) > 0 and all(isinstance(tier, Sequence) for tier in tiers)
    return lists and all(isinstance(rank, int) for tier in tiers for rank in tier)
