import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import main
from cli.web import check_open_page
from server.client import Client, Params
from tests.cli.chromium import Browser, chromium
from tests.tiny_artifact import write_tiny_artifact

KEY = "the-key-of-the-page"


@contextlib.contextmanager
def process(*arguments: str, until: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command and the word after `until` in its output, once it has said it."""
    environment = {key: value for key, value in os.environ.items() if key != "INGOT_API_KEY"}
    running = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        yield running, next(line.split()[1] for line in iter(running.stdout.readline, "") if line.startswith(until))
    finally:
        running.terminate()
        running.communicate(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path, session_len=8192)
    return path


def ask(browser: Browser, text: str) -> None:
    browser.type("#message textarea", text, instead=True)
    browser.click("#send")


def status(browser: Browser) -> str:
    return browser.value("#status textarea")


def answers(browser: Browser) -> list[str]:
    return browser.texts("#conversation [data-testid=bot]")


def questions(browser: Browser) -> list[str]:
    return browser.texts("#conversation [data-testid=user]")


def ended(browser: Browser, what: str) -> None:
    """An answer came and ended; the next one's `waiting` is not mistaken for it."""
    browser.wait(lambda: "tokens" in status(browser), what)
    browser.script("document.querySelector('#status textarea').value = ''")


def spoken(text: str) -> str:
    """Without what a page and a JSON reader see differently: blanks and control characters."""
    return "".join(filter(str.isprintable, text.replace(" ", "")))


def test_a_browser_chats(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install gradio")
    (tmp_path / "key").write_text(KEY)
    serve = ["serve", f"folder={folder}", "serve.port=0", "serve.cache_max_entry_count=80"]
    with chromium(tmp_path / "profile") as browser, contextlib.ExitStack() as stack:
        server, url = stack.enter_context(
            process(*serve, f"serve.api_key_file={tmp_path / 'key'}", "serve.session_len=8192", until="URL")
        )
        _, page = stack.enter_context(process("web", url, "--server-port", "0", until="page"))
        api = stack.enter_context(Client(url, api_key=KEY))
        browser.open(page)

        # A key is asked for, in words, and nothing else is shown without one.
        browser.wait(lambda: "key" in browser.value("#served textarea").lower(), "the refusal")
        assert "tiny" not in browser.value("#served textarea")
        browser.type("#key input", KEY)
        browser.wait(lambda: "a folder that nobody verified" in browser.value("#served textarea"), "the model")

        # An answer is the one that the API gives; a system prompt changes it as it changes the API's.
        browser.type("#temperature input[type=number]", "0", instead=True)
        browser.type("#most input", "12", instead=True)
        greedy = Params(temperature=0, max_tokens=12)
        question = {"role": "user", "content": "the cat"}
        ask(browser, "the cat")
        ended(browser, "the first answer")
        plain = "".join(api.chat([question], greedy))
        assert [spoken(text) for text in answers(browser)] == [spoken(plain)]
        browser.type("#system textarea", "the rain")
        browser.click("#retry")
        ended(browser, "the answer with a system prompt")
        ruled = "".join(api.chat([{"role": "system", "content": "the rain"}, question], greedy))
        assert spoken(ruled) != spoken(plain)
        assert [spoken(text) for text in answers(browser)] == [spoken(ruled)]

        # Other words in the message are another conversation.
        browser.click("#conversation button[aria-label=Edit]")
        browser.wait(lambda: browser.texts("#conversation textarea"), "the editor")
        browser.type("#conversation textarea", "the dog", instead=True)
        browser.click("#conversation button[aria-label=Submit]")
        browser.wait(lambda: [spoken(text) for text in questions(browser)] == ["thedog"], "the edited message")
        ended(browser, "the answer to it")
        changed = [{"role": "system", "content": "the rain"}, {"role": "user", "content": "the dog"}]
        assert [spoken(text) for text in answers(browser)] == [spoken("".join(api.chat(changed, greedy)))]

        # A long answer streams, and ends where it was stopped. The penalty makes the model repeat itself without end.
        browser.type("#penalty input[type=number]", "0.5", instead=True)
        browser.type("#most input", "7000", instead=True)
        ask(browser, "the mat")
        first = browser.wait(lambda: "answering" in status(browser) and len(answers(browser)) == 2, "a piece")
        assert first
        length = len(answers(browser)[1])
        browser.wait(lambda: len(answers(browser)[1]) > length, "more of it")
        browser.click("#stop")
        browser.wait(lambda: status(browser) == "stopped", "the stop", seconds=5)

        # A server that is gone is a sentence, and what was written is not lost.
        server.terminate()
        server.wait(30)
        ask(browser, "are you there?")
        browser.wait(lambda: "No answer: no server answers at" in status(browser), "the error")
        assert browser.value("#message textarea") == "are you there?"
        assert len(questions(browser)) == 2

        # The browser asked for nothing that is not the page's own, and the key is in no address.
        loaded = browser.script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded
        assert all(name.startswith((page, "data:", "blob:")) and KEY not in name for name in loaded)
        assert not [line for line in browser.log() if "Content Security Policy" in line]


def test_what_the_page_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["127.0.0.1:23333"], "begins with http"),
        (["http://["], "names a host"),
        (["http://user:secret@127.0.0.1:1"], "typed in the page"),
        (["http://127.0.0.1:1", "--server-name", "0.0.0.0"], "no server answers"),
        (["http://127.0.0.1:1", "--share"], "--share"),
    ):
        assert main(["web", *arguments]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert "secret" not in said


def test_other_machines_come_only_to_a_server_with_a_key(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    for extra, allowed in (([], False), ([f"serve.api_key_file={tmp_path / 'key'}"], True)):
        with process("serve", f"folder={folder}", "serve.port=0", *extra, until="URL") as (_, url):
            if allowed:
                check_open_page(url, "0.0.0.0")
            else:
                with pytest.raises(ValueError, match="asks for no key"):
                    check_open_page(url, "0.0.0.0")
