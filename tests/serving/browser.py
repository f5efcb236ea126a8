"""A page in a real browser, as a user meets it; needs chromium, chromedriver and selenium (extra `browser`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from live import QUESTIONS

selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1200,960"]
IN_BROWSER = [
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


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A page in a browser that keeps what it keeps in `folder`."""
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"user-data-dir={folder / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()
