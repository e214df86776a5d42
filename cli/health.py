"""`ingot health URL`: whether a server is ready, or lives, as an exit code, for the probes of Docker and Kubernetes."""

from __future__ import annotations

import httpx

from cli.arguments import Parser
from cli.key_files import first_key
from server.client import reason

SECONDS = 5.0


def main(argv: list[str]) -> int:
    """0 where the server says that it is; 1 and a paragraph otherwise."""
    parser = Parser(prog="ingot health", description=__doc__, allow_abbrev=False)
    parser.add_argument("url", metavar="URL", help="of the server: http://127.0.0.1:23333")
    parser.add_argument("--live", action="store_true", help="ask whether it lives, though it may take no requests")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="as serve.api_key_file, of which the first key is used; or INGOT_API_KEY"
    )
    options = parser.parse_args(argv)
    which = "live" if options.live else "ready"
    key = first_key(options.api_key_file)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not options.url.startswith(("http://", "https://")):
        raise ValueError(f"{options.url!r} is not the URL of a server: it begins with http:// or https://.")
    # No proxy and no redirect: the key goes to the address that was given and to nobody else.
    try:
        with httpx.Client(trust_env=False, timeout=SECONDS) as http:
            response = http.get(f"{options.url.rstrip('/')}/health/{which}", headers=headers)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(f"{options.url} does not answer: {reason(error)}.") from error
    if response.status_code == 401:
        raise ValueError(f"{options.url} does not know this key: give --api-key-file=FILE, or INGOT_API_KEY.")
    status = said(response)
    if response.status_code != 200:
        raise ValueError(f"{options.url} is not {which}: {status}.")
    print(status)
    return 0


def said(response: httpx.Response) -> str:
    """The `status` of an answer, else its number: what listens there may be another program."""
    try:
        return str(response.json()["status"])
    except (ValueError, KeyError, TypeError):
        return f"it answers with status {response.status_code}, not as Ingot does"
