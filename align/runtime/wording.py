"""Numbers in the sentences that are shown to people."""


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 epoch`, `1,200 steps`, `0.5 epochs`. plural: where it is not the noun with an s."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else plural or noun + 's'}"
