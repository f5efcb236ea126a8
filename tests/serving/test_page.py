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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]


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
