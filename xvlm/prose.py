"""Numbers as sentences say them."""


def counted(number: int, one: str, many: str = "") -> str:
    """``1 image``, ``0 images``, ``2 boxes``: a number and what there is so much of.

    Args:
        many: the plural, where it is not ``one`` with an s.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"
