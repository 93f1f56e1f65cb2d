"""Text without credentials, for everything that is written down or sent somewhere."""

import re
from urllib.parse import parse_qsl

SECRET_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|[_-](?:pass|pwd)|secret|token|credentials?|signature|connection[_-]?string"
    r"|(?:api|access|account|storage|secret|private|signing|encryption)[_-]?key)"
)
_AT = r"@(?:[^/\s@]*@)*"
_SECRETS = (
    # A password may hold slashes, and further @; what follows a host's colon up to a slash may be a port.
    (
        re.compile(rf"\b((?:s3a?|gc?s)://)[^/\s@:]+:[^\s@]+{_AT}|(\w://)[^/\s@:]+:(?!\d{{1,5}}/)[^\s@]+{_AT}"),
        r"\1\2***@",
    ),
    (re.compile(r"(?<!\w)(?!abfss?:|wasbs?:|az:)(\w[\w+.-]*://)[^/\s]+@"), r"\1***@"),  # Azure's is a container
    (re.compile(r"(?i)(\bauthorization\b\W+(?:basic|bearer)\s+|\bbearer\s+)[\w.~+/=-]+"), r"\1***"),
    (re.compile(rf"(?i)({SECRET_NAME}[\"']?\s*[=:]\s*[\"']?|--{SECRET_NAME}\s+)[^\s\"'&,;}}]+"), r"\1***"),
    (re.compile(r"(?i)([?&](?:sig|key|auth|code|x-amz-[\w-]+|x-goog-[\w-]+)=)[^\s\"'&]+"), r"\1***"),
    (
        re.compile(
            r"(?i)(https://(?:hooks\.slack\.com/\w+/|discord(?:app)?\.com/api/webhooks/|api\.telegram\.org/bot|"
            r"[\w.-]+\.webhook\.office\.com/))[\w/.:%@~-]+"
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:gh[pousr]|glpat|hf|sk|xox[abp])[_-][\w-]{16,}"), "***"),
)


def redact(text: str) -> str:
    """`text` without credentials: those in URLs, `password=…` and its kin, bearer tokens, keys and
    webhooks of well-known form."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def hide(address: str) -> str:
    """An address without credentials, and without its query where that may hold some: the same for every signature."""
    place, question, query = address.partition("?")
    if "://" not in address or not question:
        return redact(address)
    long = any(len(value) >= 16 for _, value in parse_qsl(query, keep_blank_values=True))
    secret = long or redact(address) != redact(place) + question + query
    return f"{redact(place)}?{'***' if secret else query}"


def bare(address: str) -> str:
    """An address without its query: what a name is made of, and what tells a file's kind."""
    return address.partition("?")[0] if "://" in address else address
