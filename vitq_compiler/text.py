"""Text that comes from a model file, made fit for a terminal."""


def printable(text: str) -> str:
    """The text with what cannot be printed spelled out: names come from the model file, and may hold control characters."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
