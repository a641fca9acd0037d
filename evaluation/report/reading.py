"""Numbers, intervals and texts out of summaries that anyone may have written: what isn't there is None or empty.

What writes a page, Markdown or a chart passes every text through `safe`.
"""

import math
from typing import Any

from rlhf.runtime import visible

Interval = tuple[float, float]

# marks without a picture of their own that turn the direction of what follows
_TURNING = {0x061C, 0x200E, 0x200F}


def number(values: Any, key: str) -> float | None:
    """A finite number, or None."""
    value = values.get(key) if isinstance(values, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def interval(values: Any, key: str) -> Interval | None:
    """What stands beside a number as `KEY_ci95`, or None."""
    bounds = values.get(f"{key}_ci95") if isinstance(values, dict) else None
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return None
    low, high = number({"": bounds[0]}, ""), number({"": bounds[1]}, "")
    return None if low is None or high is None else (low, high)


def group(values: Any, *keys: str) -> dict[str, Any]:
    """The dictionary below these keys; empty where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def items(values: Any, key: str) -> list[Any]:
    """A list; empty where there is none."""
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, list) else []


def words(values: Any, key: str) -> str:
    """A text; empty where there is none."""
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""


def safe(text: str) -> str:
    """A text whose control characters, marks of direction and halves of characters are shown as escapes.

    It can be written as UTF-8, and as XML once it is escaped.
    """
    shown = visible(text.replace("\r\n", "\n"))
    return "".join(f"\\x{ord(c):02x}" if _not_a_character(ord(c)) else c for c in shown)


def _not_a_character(code: int) -> bool:
    return code in _TURNING or 0xD800 <= code <= 0xDFFF or code & 0xFFFE == 0xFFFE


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text; what is left out is counted."""
    if len(text) <= most:
        return text
    return f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"


def one_line(text: str, most: int = 60) -> str:
    """A name on one line, safe to show and not too long."""
    plain = " ".join(safe(text).split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


DEEPEST = 40  # lists in lists: no file of a run needs as many


def finite(value: Any, depth: int = 0) -> Any:
    """The same value without numbers that JSON can't hold, and without what lies deeper than any file needs: None."""
    if isinstance(value, dict | list | tuple) and depth == DEEPEST:
        return None
    if isinstance(value, dict):
        return {str(key): finite(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner, depth + 1) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_digits(value: float | None, digits: int = 3) -> str:
    """A number with so many digits after the point, thousands apart; a dash where it isn't known."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """A difference, with its sign; no sign where it is rounded to 0."""
    text = f"{value:+,.{digits}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def in_brackets(bounds: Interval | None, digits: int = 3) -> str:
    """An interval; empty where it isn't known."""
    return "" if bounds is None else f"[{with_digits(bounds[0], digits)}, {with_digits(bounds[1], digits)}]"


def whole(value: float | None) -> str:
    """A count, thousands apart; a dash where it isn't known."""
    return with_digits(value, 0)
