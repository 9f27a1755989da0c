"""Ledger: what is alive in memory while a step is played, and its highest moment."""

from __future__ import annotations

from collections.abc import Sequence

from benthic.plan.activations import Saved
from benthic.plan.breakdown import Term


class Group:
    """Tensors that come and go together, bytes a token; one entry in the ledger, taken apart at the end."""

    def __init__(self, tensors: Sequence[Saved]) -> None:
        self.tensors = tensors
        self.bytes = sum(one.bytes for one in tensors)


class Ledger:
    """Bytes alive by (part, name), and a copy of them at the highest moment."""

    def __init__(self) -> None:
        self.alive: dict[tuple[str, str | Group], float] = {}
        self.formulas: dict[tuple[str, str | Group], str] = {}
        self.peak: dict[tuple[str, str | Group], float] = {}
        self.highest = ""
        self._total = self._peak_total = 0.0

    def hold(self, part: str, name: str | Group, size: float, formula: str = "") -> None:
        """`size` more bytes are alive (fewer, if negative)."""
        self.alive[part, name] = self.alive.get((part, name), 0.0) + size
        self._total += size
        if formula:
            self.formulas[part, name] = formula

    def moment(self, name: str, **workspace: float) -> None:
        """A moment at which `workspace` is alive too."""
        total = self._total + sum(workspace.values())
        if total > self._peak_total:
            extra = {("workspace", key.replace("_", " ")): size for key, size in workspace.items()}
            self.peak, self.highest, self._peak_total = self.alive | extra, name, total

    def terms(self, tokens: float) -> tuple[Term, ...]:
        """What was alive at the highest moment; what has no formula is shown by its bytes a token."""
        return tuple(
            Term(*key, self.formulas.get(key) or f"{size / tokens:,.0f} B a token x {tokens:,.0f} tokens", size)
            for key, size in self._by_name().items()
            if size > 0.5
        )

    def _by_name(self) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for (part, name), size in self.peak.items():
            shares = (
                {name: 1.0} if isinstance(name, str) else {one.name: one.bytes / name.bytes for one in name.tensors}
            )
            for one, share in shares.items():
                found[part, one] = found.get((part, one), 0.0) + share * size
        return found
