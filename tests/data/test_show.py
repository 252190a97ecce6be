"""Who wrote which token: the row, or its template."""

from __future__ import annotations

from fastpo.data.show import Piece, pieces


def test_tokens_are_marked_by_who_wrote_them() -> None:
    texts = ["<user>", " Sky", "?", "<end>", "<assistant>", "Blue", "."]
    scored = [False] * 4 + [False, True, True]
    marked = pieces(texts, scored, iter(["Sky? ", "Blue."]))
    assert [piece.text for piece in marked if not piece.from_row] == [
        "<user>",
        "<end>",
        "<assistant>",
    ]
    assert marked[5] == Piece("Blue", from_row=True, scored=True)


def test_what_a_template_leaves_out_marks_nothing() -> None:
    (piece,) = pieces(["<empty>"], [True], iter(["a thought", ""]))
    assert piece == Piece("<empty>", from_row=False, scored=True)
