"""The chat page in a real browser, against a real HTTP server: what a user sees and does.

All but one test use a scripted engine, so that what must appear is known; the last one asks a real model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.live import live, tiny_model
from tests.unit.serve.scripted import ScriptedEngine, adds_up, within

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
ATTACK = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><b>bold</b> & {{7*7}}'


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Debian's chromium; skips with the reason, or fails where SPRAT_REQUIRE_BROWSER=1."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "playwright is not installed (pip install playwright)"
        if os.environ.get("SPRAT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield chrome
        chrome.close()


class Visit:
    """One user in front of the page; at the end nothing may have gone wrong behind it."""

    def __init__(
        self, browser: Any, engine: Any, stack: ExitStack, *, settings: dict[str, Any], look: dict[str, Any]
    ) -> None:
        self.engine = engine
        self.address = stack.enter_context(live(engine, **settings))
        context = browser.new_context(**look)
        stack.callback(context.close)
        context.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type != "log" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        context.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.address)
        self.page.locator("#model", has_text="tiny").wait_for(state="attached")  # a script in the page may not evaluate

    def ask(self, question: str) -> None:
        self.page.get_by_label("Your question").fill(question)
        self.page.keyboard.press("Enter")

    def settled(self) -> None:
        self.page.get_by_label("Send").wait_for()

    def texts(self, selector: str) -> list[str]:
        return list(self.page.locator(selector).all_inner_texts())

    def check(self) -> None:
        assert self.errors == []
        assert self.requests
        away = [url for url in self.requests if not url.startswith((f"{self.address}/", "data:"))]
        assert away == [], "the page asked another origin"


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Make a ``Visit``; it is checked for errors and foreign requests when the test ends."""
    with ExitStack() as stack:
        visits: list[Visit] = []

        def make(engine: Any = None, look: dict[str, Any] | None = None, **settings: Any) -> Visit:
            settings = {"examples": ["add 3 and 4", "add 10 and 20 and 30"], **settings}
            visits.append(Visit(browser, engine or ScriptedEngine(), stack, settings=settings, look=look or {}))
            return visits[-1]

        yield make
        for one in visits:
            one.check()


def test_a_question_is_answered_with_its_thinking_and_its_cost(visit: Any) -> None:
    here = visit()
    here.ask("add 3 and 4 and 5")
    here.settled()
    assert here.texts(".user") == ["add 3 and 4 and 5"]
    assert here.texts(".answer") == ["The sum is 12"]
    assert "7 + 5 = 12." in here.texts(".thinking .text")[0]
    (cost,) = here.texts(".cost")
    assert "¥0.000322" in cost  # 2 hit, 4 miss, 19 out at 1, 4 and 16 yuan a million
    assert "6 tokens in (2 hit, 4 miss)" in cost
    assert "19 out (15 thinking)" in cost
    assert here.texts("#total") == ["this chat ¥0.000322"]
    here.check()


def test_thinking_folds_and_unfolds_by_mouse_and_keyboard(visit: Any) -> None:
    here = visit()
    here.ask("add 3 and 4")
    here.settled()
    said = here.page.locator(".thinking .text")
    summary = here.page.locator(".thinking summary")
    assert said.is_visible()
    assert "Thought for" in summary.inner_text()
    summary.click()
    assert not said.is_visible()
    summary.focus()
    here.page.keyboard.press("Enter")
    assert said.is_visible()
    here.page.keyboard.press("Space")
    assert not said.is_visible()


def test_the_thinking_switch_is_obeyed_and_remembered(visit: Any) -> None:
    here = visit()
    for name, thinks in (("off", False), ("on", True), ("auto", None)):
        here.page.locator("#switch label", has_text=name).click()
        here.ask("add 3 and 4")
        here.settled()
        assert here.engine.asked[-1][1].thinking is thinks
    assert here.page.locator(".assistant").nth(0).locator(".thinking").count() == 0
    assert here.page.locator(".assistant").nth(1).locator(".thinking").count() == 1
    here.page.get_by_role("radio", name="off").focus()
    here.page.keyboard.press("ArrowLeft")  # by keyboard: from off to on
    here.page.reload()
    assert here.page.get_by_role("radio", name="on", exact=True).is_checked()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_stops_the_engine_keeps_what_was_said_and_tells_the_cost(visit: Any, how: str) -> None:
    here = visit(ScriptedEngine(hold=True))
    here.ask("add 1 2 3 4 5 6 7 8 9")
    here.page.locator(".thinking .text", has_text="0 +").wait_for()
    assert here.page.locator("#send").is_hidden()
    if how == "button":
        here.page.get_by_role("button", name="Stop").click()
    else:
        here.page.keyboard.press("Escape")
    here.settled()
    assert here.engine.handles[0].cancelled.is_set()
    (cost,) = here.texts(".cost")
    assert cost.startswith("stopped")
    assert "2 out" in cost
    assert here.texts(".thinking .text") == ["0 + "]


def test_regenerate_asks_again_and_replaces_only_the_last_answer(visit: Any) -> None:
    said = iter(["first", "second", "third"])
    here = visit(ScriptedEngine(lambda question, sampling: ("", next(said))))
    here.ask("one")
    here.settled()
    here.ask("two")
    here.settled()
    assert here.page.get_by_role("button", name="Regenerate").count() == 1
    here.page.get_by_role("button", name="Regenerate").click()
    here.page.locator(".answer", has_text="third").wait_for()
    here.settled()
    assert here.texts(".answer") == ["first", "third"]
    question, sampling = here.engine.asked[-1]
    assert [said in question for said in ("one", "first", "two", "second")] == [True, True, True, False]
    assert here.engine.asked[1][1].temperature == 0 < sampling.temperature


def test_text_from_anywhere_is_shown_inert(visit: Any) -> None:
    here = visit(ScriptedEngine(lambda question, sampling: (ATTACK, ATTACK)), examples=[ATTACK])
    assert here.texts("#chips button") == [ATTACK]
    here.ask(ATTACK)
    here.settled()
    assert here.texts(".user") == [ATTACK]
    assert here.texts(".answer") == [ATTACK]
    assert here.texts(".thinking .text") == [ATTACK]
    here.page.reload()
    here.page.locator(".past .open").click()
    assert here.texts(".past .open") == here.texts(".answer") == [ATTACK]
    assert here.page.evaluate("window.pwned") is None
    assert here.page.locator("main img, main b b, .text *").count() == 0


def test_chats_are_kept_reopened_and_deleted(visit: Any) -> None:
    here = visit()
    here.page.get_by_role("button", name="add 10 and 20 and 30").click()  # an example question
    here.settled()
    here.page.get_by_role("button", name="New chat").click()
    assert here.page.get_by_role("heading", name="Ask, and watch it think").is_visible()
    here.ask("add 1 and 1")
    here.settled()
    here.page.reload()
    assert here.texts(".past .open") == ["add 1 and 1", "add 10 and 20 and 30"]
    here.page.get_by_role("button", name="add 10 and 20 and 30").first.click()
    assert here.texts(".answer") == ["The sum is 60"]
    here.page.get_by_role("button", name="Delete this chat").first.click()
    assert here.texts(".past .open") == ["add 10 and 20 and 30"]
    assert here.texts(".answer") == ["The sum is 60"]


def test_a_model_of_single_questions_gets_each_one_alone(visit: Any) -> None:
    here = visit(max_history_turns=0)
    for question in ("add 3 and 4", "add 5 and 6"):
        here.ask(question)
        here.settled()
    (first, _), (second, _) = here.engine.asked
    assert "add 3" in first and "add 5" in second and "add 3" not in second
    assert "on its own" in here.texts("#note")[0]


def test_a_refusal_is_shown_as_a_sentence_and_can_be_tried_again(visit: Any) -> None:
    here = visit()
    here.ask("this is too long")
    here.page.get_by_role("alert").wait_for()
    assert "9999 tokens" in here.texts(".fault")[0]
    here.settled()
    assert here.page.get_by_role("button", name="Regenerate").is_enabled()
    here.errors[:] = [error for error in here.errors if "400" not in error]  # the browser's own note of the status


def test_the_page_fits_a_phone_and_has_a_dark_face(visit: Any) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark", "has_touch": True}
    here = visit(look=phone)
    here.ask("add 3 and 4 " + "9" * 200)
    here.settled()
    assert here.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert here.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 20, 26)"
    assert not here.page.locator("#side").is_visible()
    here.page.get_by_role("button", name="Chats").click()
    here.page.locator("#side").wait_for()
    here.page.keyboard.press("Escape")
    assert within(20, lambda: not here.page.locator("#side").is_visible())


def test_leaving_a_running_answer_frees_the_engine(visit: Any) -> None:
    here = visit(ScriptedEngine(adds_up, hold=True))
    here.ask("add 1 2 3 4 5")
    here.page.locator(".thinking .text", has_text="0 +").wait_for()
    here.page.get_by_role("button", name="New chat").click()
    assert within(20, here.engine.handles[0].cancelled.is_set)
    assert here.page.get_by_role("heading", name="Ask, and watch it think").is_visible()
    here.settled()


def test_a_real_model_answers_through_the_real_command(browser: Any, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    program = (
        "from sprat.serve import ServeConfig, run; "
        f"run({str(tmp_path)!r}, ServeConfig(port=0, served_model_name='tiny', max_tokens=16))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        page = browser.new_page()
        page.goto(server.stdout.readline().strip())
        page.locator("#switch label", has_text="on").click()
        page.get_by_label("Your question").fill("what is 3 + 4?")
        page.keyboard.press("Enter")
        page.locator(".cost", has_text="¥0.00").wait_for()
        assert page.locator(".thinking .text").inner_text()
        assert "thinking)" in page.locator(".cost").inner_text()
        page.close()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
