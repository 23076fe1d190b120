"""Numbers and texts as a table shows them: digits that the error leaves meaningful, intervals, no control bytes."""

import re
from collections.abc import Sequence

ABSENT = "–"


def with_interval(
    value: float | int | None, interval: Sequence[float | int] | None, digits: int = 3, sign: str = "", unit: str = ""
) -> str:
    """``3.412 (3.401 to 3.423)``; without an interval only the value.

    Parameters
    ----------
    digits
        After the point; below 0: significant digits in scientific notation (``1.7e9``).
    sign
        ``"+"`` shows signs of positive values too. A value that rounds to zero has no sign.
    unit
        Behind the value.
    """
    if value is None:
        return ABSENT
    shown = [
        format(x, f"{sign},.{digits}f" if digits >= 0 else f"{sign}.{-digits - 1}e") for x in (value, *(interval or ()))
    ]
    shown = [re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", x) for x in shown]
    shown = [x if re.search("[1-9]", x) else x.lstrip("+-") for x in shown]
    return shown[0] + unit + (f" ({shown[1]} to {shown[2]})" if interval else "")


def with_error(value: float | int | None, error: float | int | None) -> str:
    """A value to the digits that its error leaves meaningful: ``1.53 ± 0.02``, ``1,106 ± 13``."""
    if value is None:
        return ABSENT
    if not error:
        return f"{value:z,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    digits = 0 if error >= 10 else 1 if error >= 0.3 else 2 if error >= 0.005 else 3
    return f"{value:z,.{digits}f} ± {error:,.{digits}f}"


def learning_rate(value: float | int | None) -> str:
    """A learning rate: ``0.0063``."""
    return ABSENT if value is None else f"{value:.3g}"
