"""Numbers as people read them."""

from __future__ import annotations


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """`value` with `digits` decimals, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share of 1 in per cent, or a dash."""
    return number(None if value is None else 100 * value, digits, "%")


def size(parameters: int) -> str:
    """A number of parameters as people say it."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f} {name}"
    return str(parameters)


def counted(number: int | None, noun: str) -> str:
    """A number, if it is known, with its noun."""
    if number is None:
        return f"an unknown number of {noun}s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def byte_size(count: int) -> str:
    """A number of bytes as people say it."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def duration(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
