"""The members of a comparison: every combination of presets, settings, learning rates, k and seeds, with a name."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Hashable, Iterator, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax_sae import InputError, Preset, SAEConfig
from jax_sae.data import ActivationSet

from .config import ResolvedConfig, TrainConfig, resolve

TOP_K = ("topk", "batch_topk")


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a comparison.

    Attributes:
      name: of its folder; unique.
      system: the name without the seed: members of one system differ in their initial parameters only.
      resolved: the run.
    """

    name: str
    system: str
    resolved: ResolvedConfig

    @property
    def sae(self) -> SAEConfig:
        return self.resolved.sae


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value of a field, and how it was typed."""

    value: Any
    text: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the members of a comparison differ in.

    Attributes:
      presets: which sparse autoencoders.
      seeds: of their initial parameters.
      learning_rates: tried with each; each preset's own when empty.
      k: tried with each whose activation is topk or batch_topk; none of these when empty.
      vary: fields of SAEConfig, and the values tried with each.
    """

    presets: tuple[Preset, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...] = ()
    k: tuple[int, ...] = ()
    vary: dict[str, tuple[Setting, ...]] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Refuses a grid with nothing, or with something twice, in it.

        Raises:
          InputError: the flag is named.
        """
        for flag, values in {"--presets": self.presets, "--seeds": self.seeds}.items():
            if not values:
                raise InputError(f"{flag} is empty; expected at least one")
        _refuse_twice("--presets", self.presets)
        _refuse_twice("--seeds", self.seeds)
        _refuse_twice("--learning-rates", self.learning_rates)
        _refuse_twice("--k", self.k)
        for name, settings in self.vary.items():
            _refuse_twice(f"--vary {name}", [setting.value for setting in settings])
        for seed in self.seeds:
            if seed < 0:
                raise InputError(f"--seeds has {seed}; expected at least 0")
        for rate in self.learning_rates:
            if not rate > 0:
                raise InputError(f"--learning-rates has {rate}; expected positive numbers")


def _refuse_twice(flag: str, values: Sequence[Hashable]) -> None:
    twice = [value for value, count in collections.Counter(values).items() if count > 1]
    if twice:
        raise InputError(f"{flag} has {twice[0]} more than once; give every value once")


def members(base: TrainConfig, grid: Grid, activations: ActivationSet) -> list[Member]:
    """Every combination of the grid.

    Args:
      base: the flags that all share; its ``workdir`` is where their folders go. The first seed of the grid is that of
        the order of the data, for all of them.
      grid: what they differ in.
      activations: the set.

    Raises:
      InputError: an empty grid, or a combination that cannot be; it is named.
    """
    grid.validate()
    found = []
    for system, seed in itertools.product(_systems(grid), grid.seeds):
        name = f"{system.name}-seed{seed}" if len(grid.seeds) > 1 else system.name
        assert base.workdir is not None
        flags = dataclasses.replace(base, seed=seed, data_seed=grid.seeds[0], workdir=base.workdir / name)
        found.append(Member(name, system.name, _resolve(flags, system, activations)))
    return found


@dataclasses.dataclass(frozen=True)
class _System:
    name: str
    preset: Preset
    learning_rate: float | None
    fields: dict[str, Any]


def _systems(grid: Grid) -> Iterator[_System]:
    """The grid without its seeds. A name has the preset, k where there is one, and what is swept."""
    rates: tuple[float | None, ...] = grid.learning_rates or (None,)
    for preset, settings in itertools.product(grid.presets, itertools.product(*grid.vary.values())):
        fields = {name: setting.value for name, setting in zip(grid.vary, settings, strict=True)}
        swept = [
            f"{name}{setting.text}"
            for name, setting in zip(grid.vary, settings, strict=True)
            if len(grid.vary[name]) > 1
        ]
        of_any_size = SAEConfig.preset(preset, d_in=64, n_concepts=64)
        keeps_k = fields.get("activation", of_any_size.activation) in TOP_K
        for k, rate in itertools.product(grid.k if keeps_k else (None,), rates):
            parts = [preset] + [f"k{k}"] * keeps_k + [f"lr{rate!r}"] * (len(rates) > 1) + swept
            name = re.sub(r"[^\w.+-]", "_", "-".join(parts))
            yield _System(name, preset, rate, fields | ({"k": k} if keeps_k else {}))


def _resolve(flags: TrainConfig, system: _System, activations: ActivationSet) -> ResolvedConfig:
    flags = dataclasses.replace(
        flags,
        preset=system.preset,
        learning_rate=system.learning_rate,
        n_concepts=system.fields.get("n_concepts", flags.n_concepts),
    )
    try:
        resolved = resolve(flags, activations)
        return dataclasses.replace(resolved, sae=dataclasses.replace(resolved.sae, **system.fields))
    except InputError as error:
        raise InputError(f"{system.name}: {error}") from error


_HINTS = get_type_hints(SAEConfig)
_NOT_VARIED = {"d_in": "it is the width of the data", "k": "give --k"}


def parse_vary(tokens: Sequence[str]) -> dict[str, tuple[Setting, ...]]:
    """The fields and values of ``FIELD=VALUE,VALUE`` tokens.

    A value has the type of its field of SAEConfig: ``none`` where that may be None, the parts of a tuple joined by
    ``:``.

    Raises:
      InputError: a token that is not of that form, an unknown field, or a value of another type.
    """
    found: dict[str, tuple[Setting, ...]] = {}
    for token in tokens:
        name, _, values = token.partition("=")
        if not values:
            raise InputError(f"--vary has {token!r}; expected FIELD=VALUE,VALUE such as alpha=1.25,1.5")
        if name in _NOT_VARIED:
            raise InputError(f"--vary {name} cannot be: {_NOT_VARIED[name]}")
        if name not in _HINTS:
            raise InputError(f"--vary {name}: SAEConfig has no such field; expected one of {', '.join(_HINTS)}")
        if name in found:
            raise InputError(f"--vary {name} is given twice; give all its values in one FIELD=VALUE,VALUE")
        found[name] = tuple(Setting(_parse(name, text), text) for text in values.split(","))
    return found


def _parse(field: str, text: str) -> Any:
    hint = _HINTS[field]
    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if NoneType in options and text.lower() == "none":
        return None
    (kind,) = (option for option in options if option is not NoneType)
    try:
        return _parse_as(kind, text)
    except (ValueError, KeyError):
        raise InputError(f"--vary {field} has {text!r}; expected {_described(kind, options)}") from None


def _parse_as(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[text]
    if get_origin(kind) is tuple:
        return tuple(get_args(kind)[0](part) for part in text.split(":"))
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)


def _described(kind: Any, options: tuple[Any, ...]) -> str:
    if get_origin(kind) is Literal:
        names = ", ".join(map(str, get_args(kind)))
    elif get_origin(kind) is tuple:
        names = "numbers joined by ':'"
    else:
        names = {bool: "true or false", int: "an integer", float: "a number"}[kind]
    return f"{names} or none" if NoneType in options else names
