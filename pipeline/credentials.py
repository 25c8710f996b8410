"""Passwords and tokens in URLs: what is written down must not hold any."""

import re

_IN_FRONT_OF_THE_HOST = re.compile(r"(?<=://)(?:[^/?#\s@:]*:[^/?#\s]*|(?<=https://)[^/?#\s]+|(?<=http://)[^/?#\s]+)@")
_IN_THE_QUERY = re.compile(r"([?&][^=&#\s]*(?:token|passw|secret|sig|key|credential)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with *** in place of what signs in to a server in each of its URLs: user:password@ and ?token=…"""
    return _IN_THE_QUERY.sub(r"\1***", _IN_FRONT_OF_THE_HOST.sub("***@", text))
