"""Function-preserving scale folds of a decoder block, found without knowing its architecture.

If an operation's output channels are divided by s and the input columns of all linear layers that
read them are multiplied by s, the block computes what it did. Which operations and layers those
are is traced in a forward (a layer reads a norm if every row of its input is a row of the norm's
output), and every candidate is then tried: a random scale is applied and the block's output must
stay as it was. Scales in the trial are powers of two, for which a true fold changes no bit of any
product, so that a nonlinearity between the two operations cannot pass for rounding.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pytest_qlab.models.experts import every_expert_reached
from pytest_qlab.models.structure import LinearSite, is_linear, routers

Convention = Literal["plain", "one_plus"]

_MAX_ROWS = 64
# Of a trial: the change that the whole fold may leave, relative to what half of it changes; noise
# relative to the output; and the least change of half a fold that can be told from noise.
_LEFT = 1e-4
_NOISE = 1e-6
_VISIBLE = 1e-4


@dataclass(frozen=True, eq=False)
class Fold:
    """A place where a positive scale of n channels can be moved from one operation to the next.

    Attributes:
        previous: dotted name of the norm or linear layer that produces the n channels.
        layers: dotted names of all matrices that read them, routers included, in model order.
        kind: what the previous operation is.
        sites: the matrices of `layers`.
    """

    previous: str
    layers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    sites: tuple[LinearSite, ...]
    _previous: nn.Module | LinearSite
    _convention: Convention = "plain"

    @property
    def channels(self) -> int:
        """Length n of the scale."""
        return self.sites[0].in_features

    def apply(self, scale: Tensor) -> None:
        """Divide the previous operation's output by `scale` [n], multiply the layers' columns."""
        self.apply_previous(scale)
        with torch.no_grad():
            for site in self.sites:
                stored = site.stored
                factor = scale.to(stored.device, torch.float32)
                factor = factor[:, None] if site.transposed else factor[None, :]
                stored.copy_(stored.float() * factor)

    def apply_previous(self, scale: Tensor) -> None:
        """The first half alone: divide the previous operation's output channels by `scale`."""
        with torch.no_grad():
            if isinstance(self._previous, LinearSite):
                stored = self._previous.stored
                factor = scale.to(stored.device, torch.float32)
                rows = factor[None, :] if self._previous.transposed else factor[:, None]
                stored.copy_(stored.float() / rows)
                if self._previous.bias is not None:
                    self._previous.bias.copy_(self._previous.bias.float() / factor)
            else:
                _divide_norm(self._previous, scale, self._convention)

    @property
    def norm(self) -> nn.Module:
        """The norm before; only of the kind `norm`."""
        assert isinstance(self._previous, nn.Module)
        return self._previous

    def norm_factor(self) -> Tensor:
        """What the norm multiplies its channels by; float64 [n]."""
        weight = self.norm.get_parameter("weight").detach().double()
        return weight if self._convention == "plain" else 1 + weight

    def neutralize(self) -> None:
        """Let the norm multiply its channels by 1; the layers do not follow."""
        with torch.no_grad():
            self.norm.get_parameter("weight").fill_(1 if self._convention == "plain" else 0)

    def parameters(self) -> list[Tensor]:
        """All parameters that `apply` writes to."""
        touched = [site.stored for site in self.sites]
        if isinstance(self._previous, LinearSite):
            touched.append(self._previous.stored)
            if self._previous.bias is not None:
                touched.append(self._previous.bias)
        else:
            touched.extend(self._previous.parameters(recurse=False))
        return touched


def discover_folds(
    block: nn.Module,
    run: Callable[[], Tensor],
    sites: Sequence[LinearSite],
    block_name: str,
) -> list[Fold]:
    """Find the block's folds: first those behind norms, then those behind linear layers.

    Args:
        block: a decoder block in eval mode.
        run: runs the block on some fixed hidden states (a few tokens are enough; they should
            differ from each other) and returns its output. Called about twice for each fold.
        sites: the block's quantizable linear layers.
        block_name: its dotted name in the model.

    Returns:
        Verified folds, disjoint in their layers. The weights are left as they were, to the bit.
    """
    everything = _with_routers(block, sites, block_name)
    with torch.no_grad(), every_expert_reached():
        trace = _trace(block, run, everything, block_name)
        trial = _Trial(run)
        folds = []
        for candidate in _norm_candidates(trace, everything):
            folds.extend(trial.accepted([candidate]))
        taken = {name for fold in folds for name in fold.layers}
        rest = [s for s in everything if s.name not in taken and s.name in trace.inputs]
        folds.extend(_linear_folds(trial, rest, everything, trace))
    return folds


def norm_readers(
    block: nn.Module,
    run: Callable[[], Tensor],
    sites: Sequence[LinearSite],
    block_name: str,
) -> list[Fold]:
    """The block's norms with all matrices that read them, as one forward shows it; not tried.

    Something else may read a norm as well: whoever changes it has to see what the block computes.

    Args:
        block, run, sites, block_name: as of `discover_folds`.
    """
    everything = _with_routers(block, sites, block_name)
    with torch.no_grad(), every_expert_reached():
        trace = _trace(block, run, everything, block_name)
        return list(_norm_candidates(trace, everything))


def _with_routers(
    block: nn.Module, sites: Sequence[LinearSite], block_name: str
) -> list[LinearSite]:
    """The sites and the block's routers in model order."""
    everything = [*sites, *routers(block, block_name)]
    order = {name: i for i, (name, _) in enumerate(block.named_modules(prefix=block_name))}
    return sorted(everything, key=lambda site: order.get(site.name, len(order)))


@dataclass
class _Trace:
    """What one forward of a block showed."""

    norms: dict[str, tuple[nn.Module, Tensor, Tensor]]  # by name: module, input and output rows
    inputs: dict[str, Tensor]  # by site: rows of its input
    reached: list[str]  # sites in the order in which they ran


def _trace(
    block: nn.Module, run: Callable[[], Tensor], sites: Sequence[LinearSite], block_name: str
) -> _Trace:
    trace = _Trace({}, {}, [])
    handles = []

    def watch_site(site: LinearSite) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            trace.reached.append(site.name)
            trace.inputs[site.name] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone()

        handles.append(site.module.register_forward_pre_hook(hook))

    def watch_norm(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(output, Tensor) and output.shape == inputs[0].shape:
                given = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone()
                made = output.detach().reshape(-1, output.shape[-1]).clone()
                trace.norms[name] = (module, given, made)

        handles.append(module.register_forward_hook(hook))

    for site in sites:
        watch_site(site)
    for name, module in block.named_modules(prefix=block_name):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and not is_linear(module):
            watch_norm(name, module)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _norm_candidates(trace: _Trace, sites: Sequence[LinearSite]) -> Iterator[Fold]:
    """One fold for each norm whose output some matrices read."""
    unreached = [site for site in sites if site.name not in trace.inputs]
    for name, (norm, given, made) in trace.norms.items():
        readers = [
            site
            for site in sites
            if site.name in trace.inputs
            and site.in_features == made.shape[-1]
            and _rows_within(trace.inputs[site.name], made)
        ]
        if not readers:
            continue
        if any(site.in_features == made.shape[-1] for site in unreached):
            # An expert that no token visited may read this norm too: nothing could prove that it
            # does or does not.
            continue
        convention = _norm_convention(norm, given, made)
        if convention is None:
            continue
        names = tuple(site.name for site in readers)
        yield Fold(name, names, "norm", tuple(readers), norm, convention)


def _rows_within(rows: Tensor, table: Tensor) -> bool:
    """Whether every row occurs, bit for bit, among the rows of the table."""
    if rows.dtype != table.dtype:
        rows, table = rows.float(), table.float()
    rows = rows[:_MAX_ROWS]
    return all(bool((table == row).all(dim=-1).any()) for row in rows)


def _norm_convention(norm: nn.Module, given: Tensor, made: Tensor) -> Convention | None:
    """How a norm's weight enters its output: as a factor, or as one plus it (Gemma)."""
    scale = _powers_of_two(made.shape[-1], seed=1).to(made.device)
    expected = made.float() / scale
    tolerance = 1e-5 if made.dtype == torch.float32 else 2e-2
    conventions: tuple[Convention, ...] = ("plain", "one_plus")
    for convention in conventions:
        with _restored(norm.parameters(recurse=False)):
            _divide_norm(norm, scale, convention)
            actual = norm(given).float()
        if (actual - expected).norm() <= tolerance * expected.norm():
            return convention
    return None


def _divide_norm(norm: nn.Module, scale: Tensor, convention: Convention) -> None:
    weight = norm.get_parameter("weight")
    factor = scale.to(weight.device, torch.float32)
    if convention == "plain":
        weight.copy_(weight.float() / factor)
    else:
        weight.copy_((1 + weight.float()) / factor - 1)
    bias = norm._parameters.get("bias")
    if bias is not None:
        bias.copy_(bias.float() / factor)


def _linear_folds(
    trial: _Trial, rest: Sequence[LinearSite], sites: Sequence[LinearSite], trace: _Trace
) -> list[Fold]:
    """Folds of linear layers into linear layers of the same parent module that ran before.

    Matrices that differ only in the numbers in their names (the same of several experts) are tried
    together: their folds touch different weights.
    """
    position = {name: index for index, name in reversed(list(enumerate(trace.reached)))}
    by_pattern: dict[tuple[str, str], list[Fold]] = defaultdict(list)
    for group in _sharing_input(rest, trace):
        first = group[0]
        if not is_linear(first.module):
            continue
        sources = [
            site
            for site in sites
            if site.parent is first.parent
            and is_linear(site.module)
            and site.name in position
            and position[site.name] < position[first.name]
            and site.out_features == first.in_features
        ]
        for source in sorted(sources, key=lambda site: -position[site.name]):
            names = tuple(site.name for site in group)
            fold = Fold(source.name, names, "linear", tuple(group), source)
            by_pattern[(_pattern(source.name), _pattern(first.name))].append(fold)

    folds: list[Fold] = []
    taken: set[str] = set()
    for candidates in by_pattern.values():
        fresh = [fold for fold in candidates if not taken.intersection(fold.layers)]
        accepted = trial.accepted(fresh)
        if not accepted and len(fresh) > 1:
            accepted = [fold for single in fresh for fold in trial.accepted([single])]
        folds.extend(accepted)
        taken.update(name for fold in accepted for name in fold.layers)
    return folds


def _sharing_input(sites: Iterable[LinearSite], trace: _Trace) -> list[list[LinearSite]]:
    """The sites in groups that read the same input, bit for bit."""
    groups: list[list[LinearSite]] = []
    for site in sites:
        rows = trace.inputs[site.name]
        for group in groups:
            if torch.equal(trace.inputs[group[0].name], rows):
                group.append(site)
                break
        else:
            groups.append([site])
    return groups


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


class _Trial:
    """Tries folds on the block: its output must not change."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run = run
        self.output = _as_rows(run())
        self.size = float(self.output.norm())
        self.tried = 0

    def accepted(self, folds: Sequence[Fold]) -> list[Fold]:
        """All of the folds if together they preserve the output, else none.

        Half of the fold must change the output: a fold whose effect cannot be seen in it is not
        accepted, since nothing would show whether it is right.
        """
        if not folds:
            return []
        self.tried += 1
        scales = [_powers_of_two(f.channels, self.tried * 1000 + i) for i, f in enumerate(folds)]
        touched = [parameter for fold in folds for parameter in fold.parameters()]
        with _restored(touched):
            for fold, scale in zip(folds, scales, strict=True):
                fold.apply_previous(scale)
            half = self._change()
        if not half >= _VISIBLE * self.size:  # not >=: NaN is no fold
            return []
        with _restored(touched):
            for fold, scale in zip(folds, scales, strict=True):
                fold.apply(scale)
            whole = self._change()
        if whole <= _LEFT * half + _NOISE * self.size:
            return list(folds)
        return []

    def _change(self) -> float:
        return float((_as_rows(self.run()) - self.output).norm())


def _as_rows(output: Tensor) -> Tensor:
    return output.detach().float().reshape(-1, output.shape[-1]).clone()


def _powers_of_two(count: int, seed: int) -> Tensor:
    """`count` float32 scales drawn from 1/4, 1/2, 1, 2, 4."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-2, 3, (count,), generator=generator)
    return torch.exp2(exponents.float())


@contextmanager
def _restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Give the parameters their values back at the end."""
    unique = {id(parameter): parameter for parameter in parameters}.values()
    saved = [(parameter, parameter.detach().clone()) for parameter in unique]
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)
