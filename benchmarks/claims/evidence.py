"""What was measured, by what claims ask for. A row that is missing is a LookupError that says which."""

from __future__ import annotations

from typing import Any

from .. import fits, layers

H = layers.WIDTHS["base"]


class Evidence:
    """The rows that were measured on one device, by what claims ask for."""

    def __init__(self, results: dict[str, dict[str, Any]]) -> None:
        """results: what `suite.run` kept, by name."""
        self.layers = results.get("layers", {})
        self.quality = results.get("quality", {})

    def times(self, level: str, name: str, by: str, width: int = H, what: str = "forward") -> fits.Times:
        key = (level, name, by, width, what)
        rows = [
            row
            for row in self.layers.get("times", [])
            if (row["level"], row["name"], row["by"], row["width"], row["what"]) == key
        ]
        found = {row["length"]: row["times"] for row in rows if "times" in row}
        if not found:
            why = f": {rows[0]['reason']}" if rows else ""
            raise LookupError(f"no times of {name} ({by}), width {width}, {what}{why}")
        return found

    def bytes(self, level: str, name: str, by: str, length: int, which: str) -> int:
        """which: "peak" or "saved"."""
        for row in self.layers.get("memory", []):
            if (row["level"], row["name"], row["by"], row["length"]) == (level, name, by, length):
                if which in row:
                    return row[which]
                raise LookupError(f"{name} ({by}), {length} tokens: {row['reason']}")
        raise LookupError(f"the memory of {name} ({by}), {length} tokens, was not measured")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        found = self.layers.get(kind, [])
        if not found:
            raise LookupError(f"{kind} was not measured")
        return found

    def named(self, kind: str, name: str) -> list[dict[str, Any]]:
        """The rows of that name that have times."""
        rows = [row for row in self.rows(kind) if row["name"] == name]
        found = [row for row in rows if "times" in row]
        if not found:
            raise LookupError(f"{name}: {rows[0]['reason']}" if rows else f"{name} was not measured")
        return found

    def computed(self, name: str) -> Any:
        """What an experiment of quality found."""
        if name not in self.quality:
            raise LookupError(f"{name} was not computed")
        return self.quality[name]


class Asking(Evidence):
    """Has the times and sizes of every part, and notes which are asked for."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked: set[tuple[Any, ...]] = set()

    def times(self, level: str, name: str, by: str, width: int = H, what: str = "forward") -> fits.Times:
        self.asked.add((level, name, by, width, what))
        return {n: [1e-6 * n] * 3 for n in (*layers.SHORT, *layers.LENGTHS["base"])}

    def bytes(self, level: str, name: str, by: str, length: int, which: str) -> int:
        self.asked.add((level, name, by, length))
        return length
