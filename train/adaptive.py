"""The training step with as many places per row as the run needs."""

import dataclasses

import jax

from jax_sae import Capacity, SAEConfig, TrainState, capacity_limit, choose_capacity, forget_needs
from jax_sae.training import Metrics

from .config import ResolvedConfig
from .parallel import Placement

_LOOKS = (0, 10, 30)  # steps before which the needs are looked at, and every so many after these:
_LOOK_EVERY = 100


class AdaptiveStep:
    """Calls the step compiled for the current capacity, and looks now and then whether it is still the right one.

    Where it looks and what it decides depend on the state and the number of the step alone, so a run that was
    stopped and resumed takes the same steps as one that never was.

    Args:
      resolved: the run.
      placement: how steps are compiled.
      state: where the run starts or resumes.
    """

    def __init__(self, resolved: ResolvedConfig, placement: Placement, state: TrainState):
        self._sae: SAEConfig = resolved.sae
        self._placement, self._every = placement, resolved.train.steps_per_call
        self._asked, self._limit = resolved.train.capacity, None
        if self._asked == "auto" and placement.name != "mesh":
            self._limit = capacity_limit(resolved.sae)
        last = Capacity(*jax.device_get(state.stats.capacity).tolist())
        self.capacity: Capacity | None = last if last.row else None
        if isinstance(self._asked, int):
            self.capacity = Capacity(self._asked, self._asked)
        self._compiled = {self.capacity: placement.step(self.capacity)}

    def __call__(self, state: TrainState, batch: jax.Array, step: int) -> tuple[TrainState, Metrics]:
        """One call of the step; ``step`` are done before it."""
        if self._asked == "auto" and self._looks(step):
            state = self._look(state)
        return self._compiled[self.capacity](state, batch)

    def _looks(self, step: int) -> bool:
        """Whether one of the looks falls into the steps of this call; after every regular one, there is a second.

        It is for runs that go on densely, where the first look only lets one call measure what is needed.
        """
        marks = {*_LOOKS, step - step % _LOOK_EVERY, step - step % _LOOK_EVERY + self._every}
        next_mark = step - step % _LOOK_EVERY + _LOOK_EVERY
        return any(step <= mark < step + self._every for mark in {*marks, next_mark})

    def _look(self, state: TrainState) -> TrainState:
        stats = jax.device_get(state.stats)
        self.capacity = choose_capacity(self._sae, stats, self._limit)
        if self.capacity not in self._compiled:
            self._compiled[self.capacity] = self._placement.step(self.capacity)
        if not stats.needs.any():
            return state
        return dataclasses.replace(state, stats=forget_needs(state.stats))
