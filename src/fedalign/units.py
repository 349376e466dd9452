"""For people: shares, bytes and seconds in the unit that a person would choose, and what others say made harmless."""

from __future__ import annotations


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal.

    >>> percent(0.8125), percent(None)
    ('81.2 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def size(nbytes: float) -> str:
    """Bytes in the unit a person would choose.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def nats(loss: float | None) -> str:
    """A loss with three decimals.

    >>> nats(0.6931), nats(None)
    ('0.693', '-')
    """
    return "-" if loss is None else f"{loss:.3f}"


def moved(before: float | None, after: float | None, times: float, decimals: int) -> str:
    """A change with its sign.

    >>> moved(0.5, 0.375, 100, 1), moved(1.0, 1.25, 1, 3), moved(None, 0.5, 100, 1)
    ('-12.5', '+0.250', '-')
    """
    return "-" if before is None or after is None else f"{times * (after - before):+.{decimals}f}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def shown(text: str, limit: int = 500) -> str:
    r"""Another party's text, as it may be shown: on one line, with nothing in it that would steer a terminal.

    >>> print(shown("\x1b[2Jward\n"))
    \x1b[2Jward\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])[:limit]
