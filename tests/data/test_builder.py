"""Groups of one row: a list as pairs."""

from __future__ import annotations

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.options import DataOptions
from tests.data.test_formats import PAIR, one, texts

LIST = {"prompt": "p", "responses": [" a", " b", " c", " d"], "scores": [2, 3, 1, 3], "weight": 2.0}


# One list of four grades: as a list, its two ends, and its best against all others.
@pytest.mark.parametrize(
    ("mode", "pairs"),
    [(None, ["bdac"]), ("best_worst", ["bc"]), ("best_rest", ["ba", "bc"])],
)
def test_list_to_pairs(tokenizers, mode, pairs):
    tokenizer = tokenizers()
    groups = row_to_group(LIST, tokenizer, DataOptions(list_to_pairs=mode), index=7)
    found = ["".join(t.removesuffix("</s>").strip() for t in texts(tokenizer, g)) for g in groups]
    assert found == pairs
    for group in groups:
        assert (group.row, group.weight) == (7, 2.0)
        if mode is not None:
            assert [r.label for r in group.responses] == [True, False]
            assert [r.rank for r in group.responses] == [0, 1]
    # The grades stay; a pair that was a pair is left alone.
    assert groups[0].responses[0].score == 3
    assert len(row_to_group(PAIR, tokenizer, DataOptions(list_to_pairs=mode))) == 1


def test_list_without_a_preference(tokenizers):
    tied = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}
    with pytest.raises(BadRow, match="'scores': all equal, so the list holds no pair"):
        row_to_group(tied, tokenizers(), DataOptions(list_to_pairs="best_rest"))
    assert len(one(tied, tokenizers()).responses) == 2
