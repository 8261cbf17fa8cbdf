"""The lessons in a real browser, as `make lab` opens them: run whole, a guess made, a control moved, the picture changes.

Needs Debian's Chromium (or another build of it) and playwright; skipped where there is none. Screenshots stay in
`screenshots/` of the repository, for people to look at.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -r requirements-test.txt")

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "screenshots"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
ALL_RUN = r"""() => {
  const open = [...document.querySelectorAll('.jp-CodeCell')].filter((each) => !each.querySelector('.jp-Placeholder'));
  const prompts = open.map((each) => each.querySelector('.jp-InputPrompt').innerText);
  return prompts.length > 8 && prompts.every((text) => /\[[0-9]+\]/.test(text));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, on a fresh working copy; its address, token included."""
    home = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns("src", "solved"))
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "minillm.lesson.lab"]
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
    try:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        _wait_for(address)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _wait_for(address: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(address.split("/lab")[0] + "/api", timeout=2)
            return
        except OSError:
            assert time.monotonic() < end, "JupyterLab did not start"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def open_lesson(browser: Any, lab: str, name: str) -> Any:
    """The page of a lesson, with a kernel ready and every cell on it (a tall window: JupyterLab draws only what is seen)."""
    page = browser.new_page(viewport={"width": 1280, "height": 12500})
    page.set_default_timeout(60_000)
    page.broken = []
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(re.sub(r"work/[^?]*", f"work/{name}", lab) + "&reset")
    page.wait_for_selector(".jp-Notebook")
    page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('Idle')")
    page.wait_for_timeout(1000)
    return page


def run_all(page: Any, lesson: str) -> None:
    page.screenshot(path=SHOTS / f"{lesson}-opened.png")
    page.locator("text=Run >> nth=0").click()
    page.locator("[data-command='runmenu:run-all']").click()
    page.wait_for_function(ALL_RUN, timeout=120_000)
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / f"{lesson}-run.png")


def redrawn_within(page: Any, read: str, before: str) -> float:
    """Seconds until what `read` gives differs from `before`."""
    began = time.monotonic()
    page.wait_for_function(f"(before) => ({read}) !== before", arg=before, timeout=5000)
    return time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def shots() -> None:
    SHOTS.mkdir(exist_ok=True)


def test_lesson_00(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "00_ranks.ipynb")
    assert page.locator(".jp-OutputArea-output").count() == 0  # a fresh working copy gives nothing away
    run_all(page, "00")
    asked = page.locator(".minillm-card", has_text="Rank 2 stays away")
    assert "No." not in asked.first.inner_text()  # Run All showed nothing early
    asked.first.locator("button", has_text="nothing, for a long time").click()
    asked.first.locator("button", has_text="That is my guess").click()
    assert "No. It is (d) a report that blames rank 2" in asked.last.inner_text()
    picture = page.locator(".minillm-card", has_text="An all-reduce as messages")
    read = "[...document.querySelectorAll('.minillm-card')].find((e) => e.innerText.includes('all-reduce as messages')).querySelector('img').src"
    before = page.evaluate(read)
    picture.locator("input[type=range]").focus()
    page.keyboard.press("End")
    print(f"redrawn in {redrawn_within(page, read, before):.2f} s")
    before = page.evaluate(read)
    picture.locator("select").select_option("rank 2")
    redrawn_within(page, read, before)
    page.screenshot(path=SHOTS / "00-moved.png")
    assert page.broken == []
    page.close()


everything = pytest.mark.skipif(not os.environ.get("MINILLM_ALL_LESSONS"), reason="a longer run: make soak")


@everything
def test_lesson_01(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "01_one_device.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "01")
    ask = page.locator(".minillm-card", has_text="How many times longer than one later token")
    assert ask.count() == 2
    assert "Measured" not in ask.first.inner_text() + ask.last.inner_text()
    axis = ask.first.locator(".minillm-guess-axis")
    area = axis.bounding_box()
    page.mouse.click(area["x"] + area["width"] * 0.6, area["y"] + 40)
    ask.first.locator("button", has_text="That is my guess").click()
    assert re.search(r"Measured: [\d.]+ ×\. You said \d+", ask.last.inner_text())
    assert ask.last.locator("img").is_visible()
    assert ask.first.locator("img").count() == 0  # the picture stands where the measurement was made
    walk = page.locator(".minillm-card", has_text="One decode step on the roof")
    words = "document.querySelector('.minillm-words').innerText"
    circles = "[...document.querySelectorAll('.minillm-card svg circle')].map((e) => e.getAttribute('cx')).join()"
    walk.locator("select").first.select_option("H200")
    walk.locator("select").last.select_option("Llama-3.1-8B")
    before, at_first = page.evaluate(circles), page.evaluate(words)
    page.locator(".minillm-batch").focus()
    page.keyboard.press("End")
    print(f"redrawn in {redrawn_within(page, circles, before):.2f} s")
    assert "computing" in page.evaluate(words)  # it flips: products no longer wait for memory
    assert "memory" in at_first
    page.locator(".minillm-context").focus()
    page.keyboard.press("End")
    assert "do NOT fit" in page.evaluate(words)
    page.locator(".minillm-batch").focus()
    page.keyboard.press("Home")
    line = page.locator(".minillm-card", has_text="One wide step reads the prompt")
    place = line.locator("canvas").bounding_box()
    page.mouse.move(place["x"] + 0.3 * place["width"], place["y"] + 20)
    tip = line.locator(".minillm-tip").inner_text()
    assert re.search(r"rank 0 · prefill · [\d.,]+ ms\n172 tokens of request 0\n[\d.]+ GFLOP, moves \d+ MB", tip)
    line.locator("button", has_text="+").click()
    page.screenshot(path=SHOTS / "01-moved.png")
    assert page.broken == []
    page.close()


def choose(page: Any, card: Any, label: str, value: str, place: int = 0) -> float:
    """Seconds until a what-if has drawn again for another choice, in the `place`-th list that has it."""
    read = "(label) => [...document.querySelectorAll('.minillm-card')].find((e) => e.innerText.includes(label)).querySelector('img').src"
    before = page.evaluate(read, label)
    began = time.monotonic()
    card.locator("select", has_text=value).nth(place).select_option(value)
    page.wait_for_function(f"([label, before]) => ({read})(label) !== before", arg=[label, before], timeout=5000)
    return time.monotonic() - began


def turn(page: Any, label: str, *values: str) -> Any:
    """Choose one value after another in a what-if, and say how long each took; returns the what-if."""
    card = page.locator(".minillm-card", has_text=label)
    for value in values:
        print(f"{value}: redrawn in {choose(page, card, label, value):.2f} s")
    return card


def guess_a_number(page: Any, ask: Any, share: float, unit: str, how: str = "Measured") -> None:
    """Guess at a share of the axis; the measurement, in this unit, shows then."""
    area = ask.first.locator(".minillm-guess-axis").bounding_box()
    page.mouse.click(area["x"] + area["width"] * share, area["y"] + 40)
    ask.first.locator("button", has_text="That is my guess").click()
    assert re.search(rf"{how}: [\d.,]+ {unit}\. You said", ask.last.inner_text())


def guess_a_factor(page: Any, ask: Any, share: float, how: str = "Measured") -> None:
    """Guess at a share of the axis; the measurement shows then, with its picture, and not before."""
    assert how not in ask.first.inner_text() + ask.last.inner_text()
    guess_a_number(page, ask, share, "×", how)
    assert ask.last.locator("img").is_visible()


@everything
def test_lesson_02(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "02_many_requests.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "02")
    ask = page.locator(".minillm-card", has_text="How many times longer do static batches take")
    guess_a_factor(page, ask, 0.7)
    card = turn(page, "Which curve wins, and where does it bend?", "H100", "all of 16 tokens", "Llama-3.1-8B")
    card.locator("select", has_text="T4").select_option("T4")
    page.wait_for_function("document.body.innerText.includes('they do not fit')")
    page.screenshot(path=SHOTS / "02-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_03(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "03_paged_kv_cache.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "03")
    live = page.locator(".minillm-card", has_text="Blocks are taken when a token needs one").first
    told = live.inner_text()
    assert "32 of 64 blocks held" in told  # it stands at the fullest step
    live.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(200)
    assert live.inner_text() != told
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    assert "13 of 25: " in live.inner_text()
    forks = page.locator(".minillm-card", has_text="Three answers share").first
    assert "×3" in forks.locator("svg").text_content()
    ask = page.locator(".minillm-card", has_text="At the fullest moment, how much of the held room")
    assert "Measured" not in ask.first.inner_text() + ask.last.inner_text()
    ask.first.locator("button", has_text="Skip").click()
    assert "Measured: 19.5 %" in ask.last.inner_text()  # counts, so the same everywhere
    turn(page, "How many sequences fit beside the weights?", "H200", "documents that fill the context", "Llama-3.1-8B")
    page.screenshot(path=SHOTS / "03-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_04(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "04_layers_over_devices.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "04")
    ask = page.locator(".minillm-card", has_text="How many times as long do four take")
    guess_a_factor(page, ask, 0.2)
    lost = page.locator(".minillm-card", has_text="once without layer 8")
    lost.first.locator("button", has_text="skip").click()
    assert "Without 8:" in lost.last.inner_text()
    turn(page, "How many devices does it take?", "T4", "Llama-3.1-8B", "1 Gbit/s", "H200", "SmolLM2-135M")
    page.screenshot(path=SHOTS / "04-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_05(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "05_pipeline.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "05")
    drawn = page.locator(".minillm-card", has_text="share of four stages")
    assert "replayed" not in drawn.first.inner_text() + drawn.last.inner_text()
    area = drawn.first.locator(".minillm-sketch").bounding_box()
    lock = drawn.first.locator("button", has_text="That is my drawing")
    for n, height in enumerate((0.1, -0.4, 0.3, 0.5, 0.6)):  # the second one is dragged out of the picture
        assert lock.is_disabled()
        share = (62 + n * 628 / 4) / 880
        page.mouse.move(area["x"] + area["width"] * share, area["y"] + area["height"] * 0.5)
        page.mouse.down()
        page.mouse.move(area["x"] + area["width"] * share, area["y"] + area["height"] * height, steps=4)
        page.mouse.up()
    page.mouse.move(area["x"] + area["width"] * 0.4, area["y"] + area["height"] * 0.9)  # no button: nothing follows
    assert "2: 100 %" in [dot.get_attribute("aria-label") for dot in drawn.first.locator("circle").all()]
    lock.click()
    assert "replayed, this model" in drawn.last.inner_text()
    assert "Furthest off at" in drawn.last.inner_text()
    label = "Where would you cut?"
    card = page.locator(".minillm-card", has_text=label)
    strip = card.locator(".minillm-strip").bounding_box()
    read = f"[...document.querySelectorAll('.minillm-card')].find((e) => e.innerText.includes('{label}')).querySelector('img').src"
    before = page.evaluate(read)
    cut = strip["x"] + strip["width"] * (80 + 740 * 23 / 30) / 900
    page.mouse.move(cut, strip["y"] + strip["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(cut + strip["width"] * 0.12, strip["y"] + strip["height"] * 0.4, steps=5)
    page.mouse.up()
    print(f"cut moved: redrawn in {redrawn_within(page, read, before):.2f} s")
    page.wait_for_timeout(1000)  # a drag asks for several pictures
    assert card.locator(".minillm-strip text").all_text_contents()[-1] in ("1", "2", "rank 3: 3")
    print(
        f"H100: redrawn in {choose(page, card, label, 'H100'):.2f} s, 1 Gbit/s: {choose(page, card, label, '1 Gbit/s'):.2f} s"
    )
    print(f"decode: redrawn in {choose(page, card, label, 'decode, 4 groups of 16 requests'):.2f} s")
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS / "05-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_06(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "06_collectives.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "06")
    board = page.locator(".minillm-card", has_text="Let every rank have the sum")
    cell = lambda rank, chunk: board.locator(f'g[aria-label^="rank {rank}, chunk {chunk}:"]')  # noqa: E731
    for source, target in ((0, 1), (0, 2)):
        cell(source, 0).click()
        cell(target, 0).click()
    assert "rank 0 sends chunk 0 to rank 2, which adds it" in board.inner_text()
    cell(1, 0).focus()
    page.keyboard.press("Enter")
    cell(2, 0).focus()
    page.keyboard.press("Enter")
    assert "rank 0's numbers would count twice" in board.inner_text()
    page.screenshot(path=SHOTS / "06-board.png", clip=board.bounding_box())
    board.locator("button", has_text="start again").click()
    for step in range(6):
        if step == 3:  # rank 0 has all of chunk 1: its sign is in the middle, where one clicks
            cell(0, 1).click()
            assert "chunk 1 of rank 0: to which rank?" in board.inner_text()
        board.locator("button", has_text="the ring's next step").click()
    assert "The most that one rank sent: 1.5 times its numbers; nobody can do with less" in board.inner_text()
    ask = page.locator(".minillm-card", has_text="How many times its numbers does each of 64")
    assert "1.97" not in ask.first.inner_text() + ask.last.inner_text()
    ask.first.locator("button", has_text="skip").click()
    assert "Counted: 1.97 ×" in ask.last.inner_text()
    turn(page, "What does the sum after a block cost?", "1 Gbit/s", "T4", "NVLink 4")
    page.screenshot(path=SHOTS / "06-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_07(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "07_tensor.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "07")
    ask = page.locator(".minillm-card", has_text="Cut W and V how")
    assert "Columns of W give" not in ask.first.inner_text() + ask.last.inner_text()
    ask.first.locator("button", has_text="W by columns, V by rows").click()
    assert "Columns of W give" not in ask.last.inner_text()
    ask.first.locator("button", has_text="That is my guess").click()
    assert "Columns of W give" in ask.last.inner_text()
    assert ask.last.locator("img").is_visible()
    guess_a_factor(page, page.locator(".minillm-card", has_text="How many times as fast do two ranks read"), 0.6)
    label = "What if W and V were cut another way?"
    cuts = page.locator(".minillm-card", has_text=label)
    for value, place in (("rows", 1), ("columns", 0)):
        print(f"{value}: redrawn in {choose(page, cuts, label, value, place):.2f} s")
    cuts.screenshot(path=SHOTS / "07-cuts.png")
    card = turn(page, "How many devices for a step?", "prefill, 2,048 tokens", "1 Gbit/s", "SmolLM2-135M", "T4")
    card.screenshot(path=SHOTS / "07-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_08(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "08_data_and_queues.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "08")
    ask = page.locator(".minillm-card", has_text="how many times longer is the mean wait")
    assert "service times" not in ask.first.inner_text() + ask.last.inner_text()
    guess_a_factor(page, ask, 0.3, "By the formula")
    assert "4.5 at 90 %" in ask.last.inner_text()
    page.wait_for_timeout(1500)  # the guess is drawn into the picture
    ask.last.screenshot(path=SHOTS / "08-waits.png")
    guess_a_factor(page, page.locator(".minillm-card", has_text="how many times sooner is a single answer"), 0.5)
    card = turn(page, "Which router?", "all 100 tokens", "long and short in turns")
    card.screenshot(path=SHOTS / "08-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_09(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "09_hybrid.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "09")
    guess_a_factor(page, page.locator(".minillm-card", has_text="For each byte to the next stage"), 0.7, "Counted")
    guess_a_factor(
        page, page.locator(".minillm-card", has_text="How many times as long does a token take"), 0.3, "Planned"
    )
    ask = page.locator(".minillm-card", has_text="What is fastest?")
    ask.first.locator("button", has_text="dp=8, for both").click()
    ask.first.locator("button", has_text="That is my guess").click()
    assert "Prefill and decode want different layouts" in ask.last.inner_text()
    assert ask.last.locator("img").is_visible()
    card = turn(page, "Eight ranks, arranged", "tp, pp, dp", "tp=8", "prefill, 1 prompt of 2,048", "pp=2,tp=4")
    card.screenshot(path=SHOTS / "09-cube.png")
    card = turn(page, "Which layout wins?", "prefill, 16 prompts of 1,000", "Llama-3.1-70B", "decode, 128 requests")
    card.screenshot(path=SHOTS / "09-moved.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_10(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "10_experts.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "10")
    guess_a_factor(
        page, page.locator(".minillm-card", has_text="the fullest has how many times the mean"), 0.2, "Counted"
    )
    guess_a_factor(page, page.locator(".minillm-card", has_text="How many times as fast do two ranks"), 0.6)
    ask = page.locator(".minillm-card", has_text="What comes out?")
    ask.first.locator("button", has_text="all experts are alike").click()
    ask.first.locator("button", has_text="That is my guess").click()
    assert "no test" in ask.last.inner_text()
    card = turn(page, "Who has to wait for whom?", "by load, with copies", "in order", "by load")
    card.screenshot(path=SHOTS / "10-placed.png")
    words, picture = card.locator("input[type=text]"), card.locator("img")
    before, began = picture.get_attribute("src"), time.monotonic()
    words.fill("a rose is a rose " * 6)
    page.wait_for_function("([image, before]) => image.src !== before", arg=[picture.element_handle(), before])
    print(f"the river of other words after {time.monotonic() - began:.2f} s")
    card.screenshot(path=SHOTS / "10-roses.png")
    words.fill("")
    card.get_by_text("type a word").wait_for()
    card = turn(page, "How wide?", "H200", "100 Gbit/s", "Mixtral-8x7B")
    card.screenshot(path=SHOTS / "10-wide.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_11(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "11_distattention.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "11")
    guess_a_factor(
        page, page.locator(".minillm-card", has_text="how many times as fast are four ranks"), 0.4, "Replayed"
    )
    ask = page.locator(".minillm-card", has_text="What comes out?")
    ask.first.locator("button", has_text="fluent text").click()
    ask.first.locator("button", has_text="That is my guess").click()
    assert "averaged" in ask.last.inner_text()
    card = turn(page, "What does each rank say?", "uneven", "one is empty", "one rank")
    card.screenshot(path=SHOTS / "11-one-rank.png")
    card = turn(page, "What does each rank say?", "one is empty")
    card.screenshot(path=SHOTS / "11-empty.png")
    card = turn(page, "Who should travel?", "Llama-3.1-405B")
    for slider in card.locator("input[type=range]").all():
        slider.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(1000)
    card.screenshot(path=SHOTS / "11-travel.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_12(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "12_infinite_llm.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "12")
    ask = page.locator(".minillm-card", has_text="With borrowing: how many times as many tokens/s?")
    guess_a_number(page, ask, 0.6, "×")
    ask = page.locator(".minillm-card", has_text="gets requests of its own")
    ask.first.locator("button", has_text="called back").click()
    ask.first.locator("button", has_text="That is my guess").click()
    assert ask.last.locator("img").is_visible()
    card = turn(page, "On which links does borrowing pay?", "L4", "Llama-2-7B", "20 %")
    card.screenshot(path=SHOTS / "12-pays.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_13(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "13_disaggregation.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "13")
    ask = page.locator(".minillm-card", has_text="the longest gap (ITL) between two tokens")
    guess_a_number(page, ask, 0.4, "ms")
    ask.last.screenshot(path=SHOTS / "13-stutter.png")
    plane = page.locator(".minillm-card", has_text="Click a way; drag the corner")
    plane.screenshot(path=SHOTS / "13-plane.png")
    before = plane.inner_text()
    corner = plane.locator("circle[tabindex='0']").bounding_box()
    page.mouse.move(corner["x"] + 9, corner["y"] + 9)
    page.mouse.down()
    page.mouse.move(corner["x"] - 150, corner["y"] + 120, steps=5)
    page.mouse.up()
    assert plane.inner_text() != before
    plane.locator("[role=button]").last.click()
    page.wait_for_timeout(900)
    plane.screenshot(path=SHOTS / "13-apart.png")
    card = turn(page, "When is the move hidden?", "A100 80GB", "L4", "Llama-2-7B")
    card.screenshot(path=SHOTS / "13-hidden.png")
    card = turn(page, "How should the eight be split?", "Llama-2-7B")
    for slider in card.locator("input[type=range]").all():
        slider.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(1500)
    card.screenshot(path=SHOTS / "13-ratio.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_14(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "14_distserve.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "14")
    ask = page.locator(".minillm-card", has_text="how many times as fast is a decode step?")
    guess_a_number(page, ask, 0.6, "×")
    ask.last.screenshot(path=SHOTS / "14-phases.png")
    turn(page, "A pipeline, or tensor parallel ranks?").screenshot(path=SHOTS / "14-queues.png")
    card = turn(page, "Which placement?")
    for slider in card.locator("input[type=range]").all():
        slider.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(2500)
    card.screenshot(path=SHOTS / "14-placement.png")
    assert page.broken == []
    page.close()


@everything
def test_lesson_15(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "15_splitwise.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "15")
    ask = page.locator(".minillm-card", has_text="how many times as soon does the last of the six")
    ask.first.locator("input[type=number]").fill("100")  # the axis ends at 8
    assert "give a number from 0.5 to 8" in ask.first.inner_text()
    assert ask.first.locator("button", has_text="That is my guess").is_disabled()
    guess_a_number(page, ask, 0.6, "×")
    ask.last.screenshot(path=SHOTS / "15-burst.png")
    card = turn(page, "Who does what?")
    for slider in card.locator("input[type=range]").all():
        slider.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(1500)
    card.screenshot(path=SHOTS / "15-pools.png")
    turn(page, "Are all nine kept?", "H100 capped", "code", "by batch").screenshot(path=SHOTS / "15-objectives.png")
    assert page.broken == []
    page.close()


def test_lesson_16(browser: Any, lab: str) -> None:
    page = open_lesson(browser, lab, "16_tetriinfer.ipynb")
    assert page.locator(".minillm-card").count() == 0
    run_all(page, "16")
    ask = page.locator(".minillm-card", has_text="How often is a request put back")
    guess_a_number(page, ask, 0.6, "times")
    ask.last.screenshot(path=SHOTS / "16-back.png")
    card = turn(page, "Who lets it in?")
    for slider in card.locator("input[type=range]").all():
        slider.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(1500)
    card.screenshot(path=SHOTS / "16-forecast.png")
    turn(page, "Which part matters?", "mixed", "longest first", "greedy").screenshot(path=SHOTS / "16-parts.png")
    assert page.broken == []
    page.close()
