"""Tables of measured figures, as Markdown."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Rows by table, in the order they came."""

    tables: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)

    def row(self, table: str, *cells: str) -> None:
        """The first row of a table is its head."""
        self.tables.setdefault(table, []).append(cells)

    def head(self, table: str, *cells: str) -> None:
        """The head, where the table has none yet."""
        if table not in self.tables:
            self.row(table, *cells)

    def markdown(self) -> str:
        parts = []
        for title, (head, *rows) in self.tables.items():
            lines = [f"## {title}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
            parts.append("\n".join(lines) + "\n")
        return "\n".join(parts)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
