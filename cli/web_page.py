"""The page of `ingot web`: a chat in Gradio. The browser talks to this process, and this process to the server.

A conversation lives in its page. Answers are shown as plain text, and the page loads nothing from elsewhere: a model's
answer cannot make a browser fetch an address.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request, Response

from server.client import Answer, Client, Message, Params, ServerError

SECONDS_BETWEEN_UPDATES = 0.05
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'"
)
FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
Update = tuple[list[Message], Any, str, str]


def create_app(url: str) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def keep_to_itself(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    theme = gr.themes.Default(font=FONTS[0], font_mono=FONTS[1])
    page = Page(url).blocks()
    mounted: FastAPI = gr.mount_gradio_app(
        app, page, path="", theme=theme, footer_links=[], ssr_mode=False, mcp_server=False, enable_monitoring=False
    )
    return mounted


class Page:
    """Its events. `_running` has the answer that each open page waits for, by the id of the page."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._running: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def blocks(self) -> Any:
        with gr.Blocks(title="Ingot", analytics_enabled=False, fill_height=True) as blocks:
            served = gr.Textbox(label="Served", interactive=False, elem_id="served", lines=1)
            with gr.Row(equal_height=False):
                with gr.Column(scale=3):
                    chat = gr.Chatbot(
                        label="Conversation",
                        elem_id="conversation",
                        height=360,
                        render_markdown=False,
                        editable="user",
                        buttons=["copy"],
                        feedback_options=None,
                    )
                    text = gr.Textbox(
                        label="Message", elem_id="message", lines=2, max_lines=8, placeholder="Shift+Enter sends"
                    )
                    with gr.Row():
                        send = gr.Button("Send", variant="primary", elem_id="send")
                        stop = gr.Button("Stop", variant="stop", elem_id="stop")
                        retry = gr.Button("Retry", elem_id="retry")
                        clear = gr.Button("Clear", elem_id="clear")
                    status = gr.Textbox(label="Last answer", interactive=False, elem_id="status", lines=1, max_lines=4)
                with gr.Column(scale=1, min_width=260):
                    key = gr.Textbox(label="API key", type="password", elem_id="key", placeholder="sent as a header")
                    system = gr.Textbox(label="System prompt", elem_id="system", lines=3)
                    temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", elem_id="temperature")
                    top_p = gr.Slider(0, 1, value=1.0, step=0.01, label="Top p", elem_id="top_p")
                    top_k = gr.Number(0, label="Top k (0: all)", precision=0, minimum=0, elem_id="top_k")
                    penalty = gr.Slider(0.5, 2, value=1.0, step=0.05, label="Repetition penalty", elem_id="penalty")
                    most = gr.Number(512, label="Most tokens", precision=0, minimum=1, elem_id="most")
                    seed = gr.Textbox(label="Seed (empty: random)", elem_id="seed", lines=1)
            settings = [key, system, temperature, top_p, top_k, penalty, most, seed]
            outputs = [chat, text, status, served]
            options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            answering = options | {"concurrency_limit": None}
            gr.on([send.click, text.submit], self.send, [text, chat, *settings], outputs, **answering)
            retry.click(self.retry, [text, chat, *settings], outputs, **answering)
            chat.edit(self.edit, [text, chat, *settings], outputs, **answering)
            # Not in the queue: it must come through while an answer runs.
            stop.click(self.stop, None, None, queue=False, **options)
            clear.click(self.clear, None, [chat, status], queue=False, **options)
            key.change(self.about, [key], [served], trigger_mode="always_last", **options)
            blocks.load(self.about, [key], [served], **options)
            blocks.unload(self.stop)
        blocks.queue(default_concurrency_limit=None, max_size=None)
        return blocks

    def send(self, request: gr.Request, text: str, chat: list[dict[str, Any]], *settings: Any) -> Iterator[Update]:
        if text.strip():
            yield from self._answer([*plain(chat), {"role": "user", "content": text}], "", settings, request)
        else:
            yield plain(chat), text, "write a message first", gr.skip()

    def retry(self, request: gr.Request, text: str, chat: list[dict[str, Any]], *settings: Any) -> Iterator[Update]:
        """Another answer to the last message."""
        messages = plain(chat)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if messages:
            yield from self._answer(messages, text, settings, request)
        else:
            yield plain(chat), text, "there is nothing to answer again", gr.skip()

    def edit(
        self, edited: gr.EditData, request: gr.Request, text: str, chat: list[dict[str, Any]], *settings: Any
    ) -> Iterator[Update]:
        """The conversation up to a message, with other words in it."""
        index = edited.index if isinstance(edited.index, int) else edited.index[0]
        message = {"role": "user", "content": edited.value if isinstance(edited.value, str) else str(edited.value)}
        yield from self._answer([*plain(chat)[:index], message], text, settings, request)

    def stop(self, request: gr.Request) -> None:
        with self._lock:
            answer = self._running.get(request.session_hash or "")
        if answer is not None:
            answer.stop()

    def clear(self, request: gr.Request) -> tuple[list[Message], str]:
        self.stop(request)
        return [], ""

    def about(self, key: str) -> str:
        try:
            with Client(self._url, api_key=key.strip()) as client:
                return described(client)
        except ServerError as error:
            return "The server does not know this key: type it under API key." if error.status == 401 else str(error)

    def _answer(
        self, messages: list[Message], text: str, settings: tuple[Any, ...], request: gr.Request
    ) -> Iterator[Update]:
        """Stream the answer to `messages`; `text` is what stays in the box. A message that got no answer goes back."""
        key, system, *numbers = settings
        self.stop(request)
        yield messages, text, "waiting for the server ...", gr.skip()
        page, pieces, answer = request.session_hash or "", "", None
        asked = [{"role": "system", "content": system}, *messages] if system.strip() else messages
        try:
            with Client(self._url, api_key=key.strip()) as client:
                served = described(client)
                answer = client.chat(asked, params(*numbers))
                with self._lock:
                    self._running[page] = answer
                shown = 0.0
                for piece in answer:
                    pieces += piece
                    if (now := time.monotonic()) - shown >= SECONDS_BETWEEN_UPDATES:
                        shown = now
                        yield answered(messages, pieces), text, "answering ...", served
                yield answered(messages, pieces), text, figures(answer), served
        except ServerError as error:
            if pieces:
                yield answered(messages, pieces), text, f"The answer broke off: {error}", gr.skip()
            else:
                yield messages[:-1], messages[-1]["content"], f"No answer: {error}", gr.skip()
        finally:
            if answer is not None:
                answer.close()
                with self._lock:
                    if self._running.get(page) is answer:
                        del self._running[page]


def params(
    temperature: float, top_p: float, top_k: float | None, penalty: float, most: float | None, seed: str
) -> Params:
    try:
        number = int(seed) if seed.strip() else None
    except ValueError as error:
        raise ServerError("the seed is a whole number, or empty.") from error
    return Params(
        temperature=temperature,
        top_p=top_p,
        top_k=int(top_k or 0),
        repetition_penalty=penalty,
        max_tokens=int(most) if most else None,
        seed=number,
    )


def described(client: Client) -> str:
    model = client.model()
    artifact = f"artifact {model.artifact_id}" if model.artifact_id else "a folder that nobody verified"
    known = [model.recipe, f"evaluation: {model.verdict}" if model.verdict else None, artifact]
    return " · ".join([model.id, *filter(None, known)])


def figures(answer: Answer) -> str:
    if answer.stopped:
        return "stopped"
    parts = [] if answer.usage is None else [f"{answer.usage.completion_tokens} tokens"]
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.first_seconds is not None:
        parts.append(f"the first after {answer.first_seconds * 1000:.0f} ms")
    if answer.finish_reason == "length":
        parts.append("cut at the most tokens")
    return ", ".join(parts)


def answered(messages: list[Message], text: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": text}]


def plain(chat: list[dict[str, Any]]) -> list[Message]:
    """Roles and texts of what Gradio keeps, whose contents may be lists of parts."""
    return [{"role": each["role"], "content": text_of(each["content"])} for each in chat]


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
