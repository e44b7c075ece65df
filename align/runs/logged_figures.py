"""Which figures of a run have been logged."""

from collections.abc import Iterable


class LoggedFigures:
    """The figures that a record of a run holds. Stage, step and name identify a figure.

    The steps of a stage only increase, so the last step of each stage and the names of its figures are enough: those of
    earlier steps have been logged too.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, frozenset[str]]] = {}

    def add(self, stage: str, step: int, names: Iterable[str]) -> None:
        """Add figures of a step."""
        last = self.last_step(stage)
        if step > last:
            self._last[stage] = (step, frozenset(names))
        elif step == last:
            self._last[stage] = (step, self._last[stage][1].union(names))

    def has(self, stage: str, step: int, name: str) -> bool:
        """Whether a figure has been logged."""
        last, names = self._last.get(stage, (-1, frozenset()))
        return step < last or (step == last and name in names)

    def last_step(self, stage: str) -> int:
        """The last step of a stage of which anything has been logged; -1 where nothing has."""
        return self._last[stage][0] if stage in self._last else -1
