"""Tables as text."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[-+]?\d[-+\d.,%ex]*( .*)?|-|")  # 1,234 and 12.5% and 64x3x3x3 and 3 ms


def text_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as what is in them; those of numbers stand to the right, but for the first."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [i > 0 and all(NUMBER.fullmatch(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = ("  ".join(f"{c:>{w}}" if r else f"{c:{w}}" for c, w, r in zip(row, widths, right)).rstrip() for row in cells)
    return "\n".join(lines)
