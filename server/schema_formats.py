"""Formats of strings in JSON schemas, as patterns of our own: whatever matches one is of its format.

The grammar compiler's are looser: an address of 82.033.53.141, the 31st of February. These are narrower than the
standards that they cite, and without what JSON would write with a backslash.
"""

from __future__ import annotations

_DAY = "(0[1-9]|1[0-9]|2[0-8])"
# Every month has 28 days; the others are named with their months.
_DATE = f"[1-9][0-9]{{3}}-((0[1-9]|1[0-2])-{_DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
_OFFSET = "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = f"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{{1,6}})?{_OFFSET}"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = f"{_LABEL}(\\.{_LABEL}){{0,6}}"
_PATH = "[A-Za-z0-9._~!$&'()*+,;=:@-]"
_HEX = "[0-9a-f]"

FORMATS = {
    "date": _DATE,  # RFC 3339, section 5.6
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,4}W|[0-9]{1,4}D(T[0-9]{1,4}(H|M|S))?|T[0-9]{1,4}(H([0-5]?[0-9]M)?|M([0-5]?[0-9]S)?|S))",
    "email": f"[A-Za-z0-9_%+-]{{1,32}}(\\.[A-Za-z0-9_%+-]{{1,15}}){{0,2}}@{_LABEL}(\\.{_LABEL}){{1,3}}",  # RFC 5321
    "hostname": _HOST,  # RFC 1123
    "ipv4": f"{_OCTET}(\\.{_OCTET}){{3}}",  # RFC 2673
    "ipv6": f"({_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}",  # RFC 4291
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",  # RFC 4122
    "uri": f"[a-z][a-z0-9]{{1,9}}://{_HOST}(:[0-9]{{1,4}})?(/{_PATH}{{0,60}}){{0,8}}(\\?{_PATH}{{0,60}})?(#{_PATH}{{0,60}})?",
    "json-pointer": "(/([A-Za-z0-9._!$&'()*+,;=:@ -]|~[01]){0,60}){0,8}",  # RFC 6901
}
