"""Names of the columns that something reads, and what becomes of those that only some need."""

from __future__ import annotations

from fastpo.data.dialects import DIALECTS, SIDES

EXTRA_COLUMNS = ("gold", "ref_response")
"""Columns with a further response that is no candidate."""

CONTEXT_ROLES = {
    "context_chosen": ("context_prompt", 0),
    "context_rejected": ("context_prompt", -1),
    "bare_chosen": ("bare_prompt", 0),
    "bare_rejected": ("bare_prompt", -1),
}
"""Role -> the column with the other prompt, and the candidate that is scored after it."""

EXTRA_ROLES = ("mismatched", *EXTRA_COLUMNS, *CONTEXT_ROLES)
"""Further responses of a group that are no candidates, by role."""

PROMPT_COLUMNS = ("short_prompt", *dict.fromkeys(column for column, _ in CONTEXT_ROLES.values()))
"""Columns with a further prompt."""

PER_TOKEN = ("token_weights", "token_rewards")
"""Columns with a list a response of one number a token."""

SPAN_COLUMNS = ("spans", "chosen_spans", "rejected_spans", "chunk_spans")

# An empty cell, or an empty text in a column of lists and numbers, is how files write "absent".
NO_TEXT = {
    *("system", "weight", "margin", "group", "label", "tools", "chat_template_kwargs"),
    *("append_eos", "continue_final_message"),
    *("scores", "score", "score_chosen", "score_rejected", "ranks", *PER_TOKEN, *SPAN_COLUMNS),
}

# Columns that every dialect may have; an objective or option that needs one reads it.
OPTIONAL = {*NO_TEXT, *EXTRA_COLUMNS, *PROMPT_COLUMNS}
OPTIONAL -= {"label", "ranks"}

KNOWN = OPTIONAL.union(*(dialect.columns for dialect in DIALECTS.values()))
"""Every column that something reads."""

# What files call the grades of a pair's responses, beside `scores`.
_GRADE_FORMS = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "{}_avg_rating")

PAIR_GRADES = {side: [form.format(side) for form in _GRADE_FORMS] for side in SIDES}

OPTIONAL_OF_PAIRS = OPTIONAL.union(*PAIR_GRADES.values())
