"""Sizes in bytes, for people and from what libraries print for them."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def shown_size(count: int) -> str:
    """``1.50 GiB``, or ``12.0 MiB`` below one GiB."""
    return f"{count / 2**30:,.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:,.1f} MiB"


def bytes_of(text: str) -> int:
    """The bytes of ``1.50 GiB`` or ``512 bytes``."""
    number, unit = text.split()
    return round(float(number) * UNITS[unit])
