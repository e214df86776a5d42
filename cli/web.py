"""`ingot web URL`: a page to chat with a server in the browser, for this machine unless --server-name says more."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import uvicorn

from cli.arguments import Parser
from server.client import Client, ServerError
from server.config import is_loopback

PORT = 6006


def main(argv: list[str]) -> int:
    parser = Parser(prog="ingot web", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "url", metavar="URL", help="of the server: http://127.0.0.1:23333. Its key is typed in the page"
    )
    parser.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="address of the page (127.0.0.1)")
    parser.add_argument(
        "--server-port", type=int, default=PORT, metavar="N", help=f"its port ({PORT}); 0: any free one"
    )
    options = parser.parse_args(argv)
    return serve_page(options.url, options.server_name, options.server_port)


def serve_page(url: str, host: str, port: int) -> int:
    """Serve the page until SIGINT or SIGTERM."""
    try:
        named = urlsplit(url).hostname
    except ValueError:
        named = None
    if not url.startswith(("http://", "https://")) or not named:
        raise ValueError(f"{url!r} is not the URL of a server: it begins with http:// or https://, and names a host.")
    if "@" in url or "?" in url:
        raise ValueError("the URL of the server carries no key and no password: the key is typed in the page.")
    check_open_page(url, host)
    # What Gradio reads when it is imported: nothing is reported, and nothing is shared.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_SHARE="False")
    try:
        from cli.web_page import create_app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio, which is not installed: make setup, or pip install gradio.") from error
    from cli.serve import listening_socket

    with listening_socket(host, port) as listener:
        app = create_app(url)
        listener.listen(128)
        shown = f"[{host}]" if ":" in host else host
        print(f"server   {url}")
        print(f"page     http://{shown}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def check_open_page(url: str, host: str) -> None:
    """ValueError where the page would let other machines use a server that asks nobody for a key."""
    if is_loopback(host):
        return
    try:
        with Client(url) as client:
            client.models()
    except ServerError as error:
        if error.status in (401, 403):
            return
        raise ValueError(f"--server-name {host} opens the page to other machines, and {error}") from error
    raise ValueError(
        f"--server-name {host} would let every machine that reaches this one use {url}, which asks for no key. Give "
        "the server a key (serve.api_key_file=FILE or INGOT_API_KEY), or leave the page on 127.0.0.1 and come through "
        "`ssh -L`."
    )
