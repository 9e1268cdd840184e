"""Texts without secrets and without control characters, for everything that is written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
USER_INFO = re.compile(r"(?<=://)\S*@")  # user:password@; up to the last @, because a password may hold @ and /
SIGNED = re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig|credential)[\w-]*=)[^&\s]+")
SHORTEST = 6  # characters; a shorter value of the environment would blot out ordinary words
HIDDEN = "***"


def without_users(text: str) -> str:
    """`text` without the user names and passwords of its URLs."""
    return USER_INFO.sub(f"{HIDDEN}@", text)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of secret variables of the environment, users of URLs, and signatures in URLs."""
    values = [v for name, v in environment.items() if SECRET_NAME.search(name) and len(v) >= SHORTEST]
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, HIDDEN)
    return SIGNED.sub(rf"\g<1>{HIDDEN}", without_users(text))


def printable(text: str) -> str:
    """One line: control characters, which names of files may hold, as escapes; tabs stay."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
