"""The page in a real browser; needs chromium, chromedriver and selenium (extra `browser`).

CTC_DRAFTER_SCREENSHOT=docs/page.png keeps a picture of it with the embedded model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import IN_BROWSER, By, Keys, Page, browsing, selenium
from ctc_drafter.drafters import LookupDrafter, NoDrafter, load_drafter
from ctc_drafter.target import Target
from live import QUESTIONS, PacedDrafter, chat_ids, live, text_of, tokens_of

SIZES = [(360, 640), (1280, 800)]
pytestmark = IN_BROWSER


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path) as opened:
        yield opened


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


def test_what_was_written_stays_until_it_is_sent(page: Page, target: Target) -> None:
    with live(target, {"none": NoDrafter()}, key="sesame") as server:
        page.open(server.base)
        page.ask("Hi")
        page.wait(lambda: not page.run("return state.asking"))
        assert page.one("#text").get_property("value") == "Hi" and not page.all(".ask")
        page.one("#key").send_keys("sesame", Keys.TAB)
        page.wait(lambda: "no drafter" in page.one("#model").text)
        page.one("#text").send_keys(Keys.ENTER)
        page.wait(lambda: page.texts() and page.idle())
        assert page.one(".ask p").text == "Hi" and page.one("#text").get_property("value") == ""


def test_a_second_click_while_the_page_connects_asks_nothing_more(page: Page, target: Target) -> None:
    slow = "async (...all) => { await new Promise((done) => setTimeout(done, 200)); return real(...all); }"
    with live(target, {"none": NoDrafter()}) as server:
        page.open(server.base)
        page.run(f"const real = fetch; window.fetch = {slow}; state.model = null;")
        page.run("const idea = document.querySelector('#ideas button'); idea.click(); idea.click();")
        page.wait(lambda: page.texts() and page.texts()[0] and page.idle())
        page.settle()
        assert len(page.all(".ask")) == 1 and page.errors() == []


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
