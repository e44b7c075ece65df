"""Numbers in the sentences that are shown to people."""


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 epoch`, `1,200 steps`, `0.5 epochs`. plural: where it is not the noun with an s."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else plural or noun + 's'}"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, `4:05`, or with hours, `1:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def byte_count(count: float) -> str:
    """A number of bytes with three digits: `5.14 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
