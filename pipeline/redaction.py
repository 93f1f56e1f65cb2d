"""Text without credentials, for everything that is written down or sent somewhere."""

import re

SECRET_NAME = r"[\w.-]*(?:passw(?:or)?d|secret|token|credentials?|signature|api[_-]?key|access[_-]?key)"
_SECRETS = (
    (re.compile(r"(\w://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(?i)(\bauthorization\b\W+(?:basic|bearer)\s+|\bbearer\s+)[\w.~+/=-]+"), r"\1***"),
    (re.compile(rf"(?i)({SECRET_NAME}[\"']?\s*[=:]\s*[\"']?|--{SECRET_NAME}\s+)[^\s\"'&,;}}]+"), r"\1***"),
    (re.compile(r"(?i)([?&](?:sig|key|x-amz-[\w-]+|x-goog-[\w-]+)=)[^\s\"'&]+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:gh[pousr]|glpat|hf|sk|xox[abp])[_-][\w-]{16,}"), "***"),
)


def redact(text: str) -> str:
    """`text` without credentials: those in URLs, `password=…` and its kin, bearer tokens, keys of well-known form."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
