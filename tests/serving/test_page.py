"""The page in a real browser; needs chromium, chromedriver and selenium (extra `browser`).

CTC_DRAFTER_SCREENSHOT=docs/page.png keeps a picture of it with the embedded model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.drafters import LookupDrafter, NoDrafter, load_drafter
from ctc_drafter.target import Target
from live import QUESTIONS, PacedDrafter, chat_ids, live, text_of, tokens_of

selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1200,960"]
SIZES = [(360, 640), (1280, 800)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]

ENLARGE = """
[...document.querySelectorAll(".text .step")].filter((step) => step.told.tree).forEach((step, i) => {
  if (i % 5 !== 2) return;
  const node = (parent, n) => ({ text: `token number ${n}`, parent, log_prob: -0.1 * n, accepted: n < 3 });
  step.told.tree = [...Array(9).keys()].map((n) => node(n - 1, n));
  for (let n = 9; n < 27; n += 1) step.told.tree.push(node(n % 9, n));
});
"""
FRAME = "await new Promise(requestAnimationFrame);"
SEEN = """
const step = arguments[0], box = document.getElementById("tree");
const { left, top, right, bottom } = box.getBoundingClientRect(), at = step.getBoundingClientRect();
const size = (e) => parseFloat(getComputedStyle(e).fontSize) * (e.getScreenCTM ? e.getScreenCTM().a : 1);
return {
  shown: step.classList.contains("shown") && document.querySelectorAll(".shown").length === 1,
  box: [left, top, right, bottom], width: innerWidth, height: innerHeight,
  letters: [...box.querySelectorAll("p, text")].map(size),
  reach: [...box.querySelectorAll("rect")].every((e) => {
    const r = e.getBoundingClientRect();
    return r.right + box.scrollLeft <= left + box.scrollWidth && r.bottom + box.scrollTop <= top + box.scrollHeight;
  }),
  narrow: box.scrollWidth > box.clientWidth && right - left < innerWidth - 17,
  gap: Math.max(top - at.bottom, at.top - bottom),
};
"""


class Page:
    """The page as a user meets it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, css))

    def one(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def wait(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: true())

    def open(self, base: str, width: int = 1200, height: int = 860, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(base)
        self.wait(lambda: "connecting" not in self.one("#model").text)

    def choose(self, mode: str) -> None:
        self.one(f"label:has([value={mode}])").click()

    def ask(self, text: str) -> None:
        self.one("#text").send_keys(text, Keys.ENTER)

    def press(self, key: str) -> None:
        selenium.ActionChains(self.driver).send_keys(key).perform()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def settle(self) -> None:
        """Until the page has drawn what an event, and the scrolling that it brought, changed."""
        self.run(f"{FRAME} {FRAME} await new Promise((done) => setTimeout(done, 20)); {FRAME}")

    def talk(self, questions: int, mode: str = "drafted", tokens: int = 80) -> None:
        """A conversation much longer than the screen, in which every fifth tree is larger than a phone."""
        self.run("document.getElementById('length').value = arguments[0]", tokens)
        self.choose(mode)
        for i in range(questions):
            self.run("state.messages = []")  # nothing outgrows the context
            self.ask(QUESTIONS[i])
            self.wait(lambda: self.idle() and len(self.all(".ask")) == i + 1)  # noqa: B023
        self.run(ENLARGE)
        self.run("document.activeElement.blur()")

    def check_tree(self, step: Any) -> None:
        """That the tree of `step` can be read: in sight, all of it within reach, in letters that are not shrunk."""
        self.settle()
        seen = self.run(FRAME + SEEN, step)  # as drawn: text that streams in has moved the tree with it
        told = f"{seen}, of the step {self.run('return arguments[0].ariaLabel', step)!r}"
        assert seen["shown"] and self.one("#tree").is_displayed(), told
        left, top, right, bottom = seen["box"]
        assert left >= 8 and top >= 8 and right <= seen["width"] - 8 and bottom <= seen["height"] - 8, told
        assert min(seen["letters"]) >= 9, told
        assert seen["reach"] and not seen["narrow"], told
        assert abs(seen["gap"] - 8) < 1, told

    def touch(self, start: tuple[float, float], *moves: tuple[float, float]) -> None:
        """With one finger: a tap, or a drag by way of `moves`."""
        kinds = ["touchStart", *("touchMove" for _ in moves)]
        for kind, (x, y) in zip(kinds, (start, *moves)):
            finger = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", finger)
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        self.settle()

    def middle(self, element: Any) -> tuple[float, float]:
        """Of the first line of `element`, where there are several."""
        x, y, width, height = self.run(
            "const r = arguments[0].getClientRects()[0]; return [r.x, r.y, r.width, r.height]", element
        )
        return x + width / 2, y + height / 2

    def large(self) -> list[Any]:
        """The steps with a tree larger than a phone."""
        steps = "[...document.querySelectorAll('.text .step')]"
        return list(self.run(f"return {steps}.filter((step) => step.told.tree && step.told.tree.length > 20)"))

    def texts(self) -> list[str]:
        return [str(element.get_property("textContent")) for element in self.all(".answer .text")]

    def idle(self) -> bool:
        return bool(self.one("#send").text == "Send")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()


def test_side_by_side_says_the_same_and_shows_the_trees(page: Page, target: Target) -> None:
    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base)
        assert "lookup" in page.one("#model").text
        page.driver.execute_script("document.getElementById('length').value = 80")
        page.choose("both")
        page.ask(QUESTIONS[2])
        verdict = page.wait(lambda: page.all(".verdict"))[0].text
        assert verdict.startswith("The same text in ")
        tokens = tokens_of(target, NoDrafter(), chat_ids(target, QUESTIONS[2]), max_new_tokens=80)
        want = text_of(target, tokens)
        assert page.texts() == [want, want]
        runs = page.all(".answer:last-child .run")
        assert runs and not page.all(".answer:first-child .run")
        steps = page.all(".answer:last-child .step")
        assert sum(step.get_attribute("tabindex") == "0" for step in steps) == 1
        steps[0].click()
        assert "reading the prompt" in page.one("#tree").text
        place = next(i for i, step in enumerate(steps) if step.find_elements(By.CSS_SELECTOR, ".run"))
        for _ in range(place):
            page.press(Keys.ARROW_RIGHT)
        assert page.driver.switch_to.active_element == steps[place]
        assert "drafted tokens accepted" in page.one("#tree").text
        assert page.all("#tree svg g.taken")
        page.press(Keys.ESCAPE)
        assert not page.one("#tree").is_displayed()
        page.choose("plain")
        page.ask("And then?")
        page.wait(lambda: page.idle() and len(page.texts()) == 3)
        assert page.texts()[2]
        assert page.errors() == []


def test_an_answer_can_be_stopped_and_markup_stays_text(page: Page, target: Target) -> None:
    with live(target, {"paced": PacedDrafter(0.05), "none": NoDrafter()}) as server:
        page.open(server.base)
        page.ask("<img src=x onerror=alert(1)>")
        assert page.one(".ask p").text == "<img src=x onerror=alert(1)>"
        page.wait(lambda: len(page.all(".step")) > 3)
        assert page.one("#send").text == "Stop"
        page.one("#send").click()
        page.wait(page.idle)
        page.wait(lambda: server.service.scheduler.stats().running == 0, 2)
        page.ask("apple " * 300)
        assert "shorten it" in page.wait(lambda: page.all(".error"))[0].text
        page.one("#settings summary").click()
        page.one("#reset").click()
        assert page.one("#welcome").is_displayed() and not page.all(".answer")


def test_a_key_can_be_given(page: Page, target: Target) -> None:
    with live(target, {"none": NoDrafter()}, key="sesame") as server:
        page.open(server.base)
        assert "key is missing" in page.one("#model").text
        page.one("#key").send_keys("sesame", Keys.TAB)
        page.wait(lambda: "no drafter" in page.one("#model").text)
        page.ask("Hi")
        page.wait(lambda: page.texts() and page.idle())
        assert page.texts()[0]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_in_one_direction_only(page: Page, target: Target, dark: bool) -> None:
    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base, width=360, dark=dark)
        page.choose("both")
        page.ask("x" * 80)
        page.wait(lambda: page.all(".verdict"))
        for element in ("document.documentElement", "document.getElementById('chat')"):
            wide, room = page.driver.execute_script(f"return [{element}.scrollWidth, {element}.clientWidth]")
            assert wide <= room
        paper = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(int(v) for v in paper[4:-1].split(",")) < 200) == dark


@pytest.mark.parametrize("size", SIZES)
def test_the_tree_of_the_step_with_focus_is_in_sight(page: Page, target: Target, size: tuple[int, int]) -> None:
    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base, *size)
        page.talk(3, "both", tokens=30)
        assert page.run("const c = document.getElementById('chat'); return c.scrollHeight > c.clientHeight + 100")
        selenium.ActionChains(page.driver).move_to_element(page.one("#chat")).perform()  # where a mouse may rest
        for answer in page.all(".answer:last-child .text"):
            steps = answer.find_elements(By.CSS_SELECTOR, ".step")
            page.run("arguments[0].focus()", steps[0])
            walks = {
                Keys.ARROW_RIGHT: steps[1:],
                Keys.HOME: steps[:1],
                Keys.END: steps[-1:],
                Keys.ARROW_LEFT: steps[-2:-6:-1],
            }
            for key, walk in walks.items():
                for step in walk:
                    page.press(key)
                    assert page.driver.switch_to.active_element == step
                    page.check_tree(step)
        assert page.errors() == []


@pytest.mark.parametrize("size", SIZES)
def test_tab_shows_the_tree_of_a_step_that_was_out_of_sight(page: Page, target: Target, size: tuple[int, int]) -> None:
    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base, *size)
        page.talk(4, "both")
        page.run("document.querySelector('[name=mode]:checked').focus()")
        for answer in page.all(".answer .text"):
            page.run("const c = document.getElementById('chat'); c.scrollTop = c.scrollTop > 99 ? 0 : c.scrollHeight")
            page.settle()
            page.press(Keys.TAB)
            step = page.driver.switch_to.active_element
            assert step == answer.find_element(By.CSS_SELECTOR, ".step")
            page.check_tree(step)
        page.press(Keys.TAB)
        page.settle()
        assert not page.one("#tree").is_displayed()
        assert page.errors() == []


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_stays_with_its_step_while_text_streams_in(page: Page, target: Target, size: tuple[int, int]) -> None:
    with live(target, {"paced": PacedDrafter(0.03), "none": NoDrafter()}) as server:
        page.open(server.base, *size)
        page.talk(3, "both", tokens=30)
        page.run("document.getElementById('length').value = 100")
        before = page.run("return document.getElementById('chat').scrollTop")
        page.ask(QUESTIONS[4])
        page.wait(lambda: page.all(".answers:last-child .answer:last-child .step"))
        newest = "const step = [...document.querySelectorAll('.answer')].pop().querySelector('.step:last-child')"
        checks = 0
        while not page.idle():
            page.check_tree(page.run(f"{newest}; step.focus(); return step"))
            checks += 1
        assert checks > 5
        assert page.run("return document.getElementById('chat').scrollTop") > before


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_stays_with_its_step_until_escape(page: Page, target: Target, size: tuple[int, int]) -> None:
    def scroll(by: int) -> None:
        page.run("document.getElementById('chat').scrollTop += arguments[0]", by)
        page.settle()

    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base, *size)
        page.talk(4, "both")
        step = page.large()[3]
        page.run("arguments[0].scrollIntoView({ block: 'center' }); arguments[0].focus()", step)
        selenium.ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
        for by in (50, -100, 30):
            scroll(by)
            page.check_tree(step)
            assert page.run("return tree.scrollLeft") == 80  # within its box, too
        scroll(3000)
        assert not page.one("#tree").is_displayed()  # nor is its step
        page.run("arguments[0].scrollIntoView({ block: 'center' })", step)
        page.check_tree(step)
        page.press(Keys.ESCAPE)
        scroll(10)
        selenium.ActionChains(page.driver).move_to_element(step).move_to_element(page.one("#text")).perform()
        page.settle()
        assert not page.one("#tree").is_displayed()  # though its step still has the focus
        page.press(Keys.ARROW_RIGHT)
        page.check_tree(page.driver.switch_to.active_element)
        page.run("document.activeElement.blur()")
        page.settle()
        assert not page.one("#tree").is_displayed()

        selenium.ActionChains(page.driver).move_to_element(step).perform()
        page.check_tree(step)
        scroll(4)  # the pointer still rests on it
        page.check_tree(step)
        page.press(Keys.ESCAPE)
        page.settle()
        assert not page.one("#tree").is_displayed()


def test_a_tap_shows_a_tree_and_a_tap_elsewhere_hides_it(page: Page, target: Target) -> None:
    with live(target, {"lookup": LookupDrafter(), "none": NoDrafter()}) as server:
        page.open(server.base, 360, 640)
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        page.talk(2)
        steps = page.large()
        assert len(steps) > 2
        for step in steps[:3]:
            page.run("arguments[0].scrollIntoView({ block: 'center' })", step)
            page.settle()
            page.touch(page.middle(step))
            page.check_tree(step)
            if step != steps[2]:
                page.touch((4, 320))
                assert not page.one("#tree").is_displayed()
        sizes = [f"tree.{name}" for name in ("scrollWidth", "clientWidth", "scrollHeight", "clientHeight")]
        wide, room, high, space = page.run(f"return [{', '.join(sizes)}]")
        assert wide > room and high > space
        x, y = page.middle(page.one("#tree"))
        page.touch((x, y), *((x - by, y) for by in range(10, 130, 10)))
        assert page.run("return tree.scrollLeft") > 60
        page.check_tree(step)
        page.touch((x, y))  # on the tree itself
        page.check_tree(step)
        page.touch((4, 320))
        assert not page.one("#tree").is_displayed()
        page.touch(page.middle(step))
        page.check_tree(step)
        page.touch((4, 320))
        assert not page.one("#tree").is_displayed()
        assert page.errors() == []


@pytest.mark.skipif("CTC_DRAFTER_SCREENSHOT" not in os.environ, reason="only on request")
def test_screenshot(page: Page) -> None:
    target = Target.load(dtype="float32")
    with live(target, {"ctc": load_drafter("ctc", target), "none": NoDrafter()}) as server:
        server.service.name = "embedded"
        page.open(server.base, height=660)
        page.ask("Give three tips.")  # a warm-up
        page.wait(lambda: page.texts() and page.idle())
        page.one("#settings summary").click()
        page.one("#reset").click()
        page.one("#settings summary").click()
        page.choose("both")
        page.ask("Tom has 3 apples and buys 5 more. How many has he?")
        page.wait(lambda: page.all(".verdict"), 120)
        steps = page.all(".answer:last-child .step")[:20]
        told = [page.driver.execute_script("return arguments[0].told", step) for step in steps]
        best = max(range(1, len(steps)), key=lambda i: (told[i]["accepted"], len(told[i]["tree"])))
        steps[best].click()
        page.driver.save_screenshot(os.environ["CTC_DRAFTER_SCREENSHOT"])
