"""Measures that are computed when they are looked at, so that a gate may draw fewer windows.

`quantized.kl.mean` has to be a number of all windows when it is compared or printed, and must not
be computed at all when the next thing said is `.within(0.02)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pytest_qlab.decision import Decision, Look, Side, decide
from pytest_qlab.estimate import Estimate
from pytest_qlab.metrics.kl import KlEstimates

# Looked up on the type by Python, so that `__getattr__` does not do.
_OPERATORS = (
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__hash__"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__rfloordiv__", "__rmod__", "__rpow__"),
    *("__divmod__", "__rdivmod__", "__neg__", "__pos__", "__bool__", "__float__", "__int__"),
    *("__round__", "__trunc__", "__floor__", "__ceil__", "__str__", "__format__"),
)


class Deferred:
    """An `Estimate` to whoever looks at it, computed once, on all windows.

    Careful assertions look at growing numbers of windows instead. Their outcome is the same whether
    or not all windows were evaluated before. What reads the bits of a float, as `json` does, takes
    `float(measure)`.

    Args:
        metric, candidate: its names.
        looks: makes the looks; the last sees all windows.
        convention: finds how windows are cut, without computing anything.
        change: applied to every estimate.
    """

    def __init__(
        self,
        metric: str,
        candidate: str,
        looks: Callable[[], Sequence[Look]],
        convention: Callable[[], str],
        change: Callable[[Estimate], Estimate] | None = None,
    ) -> None:
        self.metric = metric
        self.candidate = candidate
        self._looks = looks
        self._convention = convention
        self._change = change
        self._found: Estimate | None = None
        self._decided: Decision | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`Estimate`, for `isinstance`, as of any proxy."""
        return Estimate

    def within(self, budget: float, confidence: float | None = None) -> Decision:
        """See `Estimate.within`."""
        return self._decide("<=", budget, confidence)

    def at_least(self, budget: float, confidence: float | None = None) -> Decision:
        """See `Estimate.at_least`."""
        return self._decide(">=", budget, confidence)

    def _decide(self, op: Side, budget: float, confidence: float | None) -> Decision:
        def changed(look: Look) -> Look:
            return Look(look.windows, lambda: self._changed(look.estimate()))

        self._decided = decide(
            lambda: [changed(look) for look in self._looks()],
            op,
            budget,
            confidence,
            metric=self.metric,
            candidate=self.candidate,
            convention=self._convention(),
        )
        return self._decided

    def resolved(self) -> Estimate:
        """The estimate on all windows."""
        if self._found is None:
            self._found = self._changed(self._looks()[-1].estimate())
        return self._found

    def _changed(self, found: Estimate) -> Estimate:
        return found if self._change is None else self._change(found)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Asked for by those who try what an object can do.
            raise AttributeError(name)
        return getattr(self.resolved(), name)

    def __abs__(self) -> Estimate:
        before = self._change
        change = abs if before is None else lambda found: abs(before(found))
        found = Deferred(self.metric, self.candidate, self._looks, self._convention, change)
        return cast(Estimate, found)

    def __repr__(self) -> str:
        # After a decision, which pytest explains with it, no window more is drawn for the sake of
        # a message.
        if self._found is None and self._decided is not None:
            about = ", ".join(filter(None, (f"{self._decided.value:.6g}", self._decided.sample)))
            return f"<{self.metric} of {self.candidate}: {about}>"
        return repr(self.resolved())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.array(float(self.resolved()), dtype=dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.resolved().__reduce_ex__(protocol)


def _delegated(name: str) -> Callable[..., Any]:
    operator = getattr(Estimate, name)

    def method(self: Deferred, *operands: object) -> Any:
        plain = (each.resolved() if type(each) is Deferred else each for each in operands)
        return operator(self.resolved(), *plain)

    method.__name__ = name
    return method


for _name in _OPERATORS:
    setattr(Deferred, _name, _delegated(_name))


def deferred(
    metric: str,
    candidate: str,
    looks: Callable[[], Sequence[Look]],
    convention: Callable[[], str],
) -> Estimate:
    """A `Deferred` measure, by the type that it stands for."""
    return cast(Estimate, Deferred(metric, candidate, looks, convention))


@dataclass(frozen=True, repr=False)
class DeferredKl(KlEstimates):
    """KL(base || candidate) per token, nats: deferred `mean`, `median`, `p99`, `max`, `tail`."""

    def __repr__(self) -> str:
        return f"<KL of {self.mean.candidate}>"
