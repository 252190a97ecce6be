"""Secrets: used as they are given, never written or printed.

A secret is the value of a key that says so (`hub_token`, `password`, `api_key`), what stands before
the host of an address, or text in the form of a token. The values of such keys are remembered, so
that they are also found where no key stands beside them: in a command line, in an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

# Tokens of a tokenizer, and counts a token, are no secrets although their keys end so.
_ORDINARY = re.compile(
    r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask|sos|end|eo[tmh]|stop|start|special|image|video|audio|"
    r"bo[is]|eoi|prefix|suffix|middle|fim|next|last|first|per|each|label|target|context|think|"
    r"begin|response|prompt|separator|newline|assistant)_"
)
_WORDS = re.compile(
    r"passw(?:or)?d|passphrase|(?:^|_)pwd(?:$|_)|secret|credential|authorization|^auth$|cookie"
    r"|(?:api|access|private|encryption|account|signing|auth|ssh)_?keys?(?:$|_)"
    r"|(?:api|access|auth|bearer|refresh|session)_?tokens?$|connection_string"
)
_QUERY = re.compile(r"^(?:x_amz_)?(?:sig|signature|key|token|auth)$")

# No pattern below looks far ahead from each of many places: a text may be a megabyte of one letter.
# A token that stands free, by what its maker puts before it. 40 hexadecimal digits are no token:
# a commit looks the same.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_(?:[A-Za-z0-9]{20,}|(?=[a-z]*[0-9A-Z])[A-Za-z0-9]{12,})"
    r"|sk-(?=[\w-]{0,99}\d)[\w-]{16,}"
    r"|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}"
    r"|wandb_v\d_\w{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{16,}(?:\.[\w-]*)*"
    r")"
)
_BEARER = re.compile(r"(?i)(?<=\bbearer )[\w.~+/=-]{12,}")
_USER = re.compile(r"(?<=//)([^/\s\"'<>?#]+)@")
_KEY = re.compile(
    r"(?<![\w.-])(?:(?P<flag>--[A-Za-z][\w.-]*)(?:\s+|=)|(?P<name>[\w.-]+)[\"']?\s*[=:]\s*)"
)
_VALUE = re.compile(
    r"b?\"[^\"\n]*\"?|b?'[^'\n]*'?|\[[^\]\n]*\]?|[^\s,;&#)}\]\"'<-][^\s,;&#)}\]\"'<]*"
)

_known: set[str] = set()


def is_secret(key: str) -> bool:
    """Return whether the value of this key is a secret; dotted keys are judged by every part."""
    return any(_is_secret(part) for part in re.split(r"[./]", key))


def _is_secret(part: str) -> bool:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part.strip("-")).lower().replace("-", "_")
    if _WORDS.search(name):
        return True
    return name.rpartition("_")[2] == "token" and not _ORDINARY.search(name)


def _learn(value: Any) -> None:
    """Remember every text under a secret key."""
    if isinstance(value, Mapping):
        for each in value.values():
            _learn(each)
    elif isinstance(value, str):
        # A short word stands in too many places that have nothing to do with it.
        if len(value) >= 8 or (len(value) >= 6 and any(c.isdigit() for c in value)):
            _known.add(value)
    elif isinstance(value, Sequence):
        for each in value:
            _learn(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _learn(str(value))


def learn(values: Any) -> None:
    """Remember the secrets of a mapping, or of the words of a command line."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if is_secret(str(key)) and value != REDACTED:
                _learn(value)
            else:
                learn(value)
    elif isinstance(values, str):
        for match in _USER.finditer(values):  # a path made of the address has another form
            name, colon, password = match[1].partition(":")
            if colon or any(c.isdigit() for c in name):
                _learn([match[1], password])
    elif isinstance(values, Sequence) and not isinstance(values, bytes):
        for shown, hidden in _parted(values):
            if hidden is None:
                learn(shown)
            else:
                _learn(hidden)


def _parted(words: Sequence[Any]) -> Iterator[tuple[Any, str | None]]:
    """Part each word into what may be shown and what may not, the value of a secret flag."""
    secret = False
    for word in words:
        if isinstance(word, str) and word.startswith("--" if secret else "-"):
            key, equals, value = word.partition("=")
            secret = is_secret(key)
            yield (f"{key}=", value) if secret and equals else (word, None)
        elif isinstance(word, str) and secret:
            yield "", word
        else:
            yield word, None


def _after_keys(text: str) -> str:
    """Return `--hub_token x`, `hub_token=x` and `"hub_token": "x"` without x."""
    parts, done = [], 0
    for match in _KEY.finditer(text):
        key = match["flag"] or match["name"]
        # `a token: ...` is prose, and so is what is said about a flag, `--hub_token: ...`.
        prose = key.lower() in ("token", "tokens") or key.startswith("--")
        prose = prose and match[0].rstrip().endswith(f"{key}:")
        if match.start() < done or prose or not is_secret(key):
            continue
        value = _VALUE.match(text, match.end())
        if value is None or value[0].strip("\"'") in ("null", "None", "true", "false", "True"):
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        parts += [text[done : match.end()], quote, REDACTED, quote]
        done = value.end()
    return "".join([*parts, text[done:]])


def _user(match: re.Match[str]) -> str:
    ssh = match.string.endswith("ssh://", 0, match.start())  # ssh://git@host
    return match[0] if ssh and ":" not in match[1] else f"{REDACTED}@"


def _query(match: re.Match[str]) -> str:
    key = match[2].lower().replace("-", "_")
    secret = _QUERY.match(key) or is_secret(key)
    return f"{match[1]}{match[2]}={REDACTED}" if secret else match[0]


def _text(text: str) -> str:
    for secret in sorted(_known, key=len, reverse=True):
        if secret in text:
            alone = rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"
            text = re.sub(alone, REDACTED, text)
    text = _USER.sub(_user, text)
    if "://" in text:
        text = re.sub(r"([?&;])([\w.-]+)=([^&;#\s\"'<>]+)", _query, text)
    return _after_keys(_BEARER.sub(REDACTED, _TOKEN.sub(REDACTED, text)))


def redact(value: Any) -> Any:
    """Return a copy with every secret replaced by `<redacted>`.

    Args:
        value: mappings, sequences and text are searched, keys too; anything else stays as it is.
    """
    learn(value)
    return _redact(value)


def _redact(value: Any) -> Any:
    if type(value) is str:  # an enumeration's members are texts too, and stay
        return _text(value)
    if isinstance(value, Mapping):
        return {
            _redact(key): REDACTED if _hides(key, inner) else _redact(inner)
            for key, inner in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(
            _redact(shown) if hidden is None else f"{shown}{REDACTED}"
            for shown, hidden in _parted(value)
        )
    return value


def _hides(key: Any, value: Any) -> bool:
    return is_secret(str(key)) and value is not None and not isinstance(value, bool)


def refuse_redacted(key: str, value: Any, where: str) -> None:
    """Refuse a value that was left out when a file was written.

    Raises:
        ValueError: says which key to give again.
    """
    if REDACTED in str(value):
        raise ValueError(
            f"{where}: {key} has a secret that was left out when this was written: give {key} "
            "again, or remove it"
        )
