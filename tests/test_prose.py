"""Numbers as sentences say them."""

from xvlm.prose import counted


def test_one_is_singular_and_nothing_else_is():
    assert [counted(number, "image") for number in (0, 1, 2, 11, 21)] == [
        *("0 images", "1 image", "2 images", "11 images", "21 images")
    ]
    assert (counted(1, "box", "boxes"), counted(3, "box", "boxes")) == ("1 box", "3 boxes")
