"""The training step with as many places for active concepts as the run needs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from jax_sae import Capacity, SAEConfig, TrainState, choose_capacity, forget_needs
from jax_sae.training import Metrics

_LOOKS = (0, 10, 30)  # steps before which the needs are looked at, and every so many after these:
_LOOK_EVERY = 100


class AdaptiveStep:
    """Calls the step compiled for the current capacity, and looks now and then whether it is still the right one.

    Where it looks and what it decides depend on the state and the number of the step alone, so a run that was
    stopped and resumed takes the same steps as one that never was.

    Args:
      sae: the autoencoder.
      compiled_for: from a capacity, None for the dense step, to ``step(state, ...) -> (state, metrics)``.
      state: where the run starts or resumes; it may be of several members, stacked.
      asked: auto, dense or the places of every row.
      limit: of :func:`jax_sae.capacity_limit`; None keeps auto dense.
      steps_per_call: steps that a call takes.
    """

    def __init__(
        self,
        sae: SAEConfig,
        compiled_for: Callable[[Capacity | None], Any],
        state: TrainState,
        *,
        asked: Literal["auto", "dense"] | int,
        limit: int | None,
        steps_per_call: int = 1,
    ):
        self._sae, self._compiled_for, self._every = sae, compiled_for, steps_per_call
        self._looking, self._limit = asked == "auto", limit
        self.capacity = Capacity(asked, asked) if isinstance(asked, int) else _last_capacity(state)
        self._compiled: dict[Capacity | None, Any] = {}

    def __call__(self, step: int, state: TrainState, *arguments: jax.Array) -> tuple[TrainState, Metrics]:
        """One call of the step, ``step`` of them done before."""
        if self._looking and self._looks(step):
            state = self._look(state)
        if self.capacity not in self._compiled:
            self._compiled[self.capacity] = self._compiled_for(self.capacity)
        return self._compiled[self.capacity](state, *arguments)

    def _looks(self, step: int) -> bool:
        """Whether one of the looks, or the call after one, falls into the steps of this call.

        The second look is for runs that go on densely: there the first only lets one call measure what is needed.
        """
        looks = (*_LOOKS, step - step % _LOOK_EVERY, step - step % _LOOK_EVERY + _LOOK_EVERY)
        return any(step - self._every <= look < step + self._every for look in looks)

    def _look(self, state: TrainState) -> TrainState:
        needs, capacity = jax.device_get((state.stats.needs, state.stats.capacity))
        if needs.ndim == 3:
            needs, capacity = needs.sum(0), capacity[0]
        stats = dataclasses.replace(state.stats, needs=needs, capacity=capacity)
        self.capacity = choose_capacity(self._sae, stats, self._limit)
        return dataclasses.replace(state, stats=forget_needs(state.stats)) if needs.any() else state


def _last_capacity(state: TrainState) -> Capacity | None:
    last = jax.device_get(state.stats.capacity).reshape(-1, 2)[0].tolist()
    return Capacity(*last) if last[0] else None
