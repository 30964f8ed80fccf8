"""The page on which a reader draws a digit, in a real browser, against PyTorch."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from playwright.sync_api import Browser, Page
from test_site import browser, open_context

from kdlib import data
from kdlib.book import demo

__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.browser

# Strokes on the 280 × 280 paper, in order, and the digit that they draw.
STROKES = {
    1: [[(140, 50), (140, 230)]],
    7: [[(80, 60), (200, 60), (120, 230)]],
    0: [[(140, 50), (90, 80), (80, 140), (95, 205), (140, 230), (190, 200), (200, 140), (140, 50)]],
    4: [[(100, 50), (85, 140), (190, 140)], [(180, 60), (170, 235)]],
}  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure of the intro page alone, opened as a file, as a reader without a server has it."""
    intro = (ROOT / "book/intro.md").read_text(encoding="utf-8")
    figure = intro[intro.index("<figure id") : intro.index("draw.js")] + 'draw.js"></script>'
    place = tmp_path_factory.mktemp("draw")
    (place / "_static").mkdir()
    for name in ("draw.js", "draw-examples.js", "custom.css"):
        text = (ROOT / "book/_static" / name).read_text(encoding="utf-8")
        (place / "_static" / name).write_text(text, encoding="utf-8")
    (place / "_static/draw-weights.js").write_text(demo.script(), encoding="utf-8")
    (place / "book").mkdir()
    head = (
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="../_static/custom.css">'
    )
    (place / "book/intro.html").write_text(head + figure, encoding="utf-8")
    with open_context(browser) as context:
        opened = context.new_page()
        opened.goto((place / "book/intro.html").as_uri())
        yield opened


def answers(page: Page, image: torch.Tensor) -> dict[str, list[float]]:
    return page.evaluate("pixels => kdDraw.answers(pixels)", image.flatten().tolist())


def draw(page: Page, strokes: list[list[tuple[int, int]]]) -> None:
    page.locator(".kd-clear").click()
    box = page.locator(".kd-paper").bounding_box()
    assert box
    for first, *rest in strokes:
        page.mouse.move(
            box["x"] + first[0] * box["width"] / 280, box["y"] + first[1] * box["width"] / 280
        )
        page.mouse.down()
        for x, y in rest:
            page.mouse.move(
                box["x"] + x * box["width"] / 280, box["y"] + y * box["width"] / 280, steps=8
            )
        page.mouse.up()
    page.wait_for_function("document.querySelector('#kd-draw [role=status]').textContent")


def test_a_thousand_digits_have_the_answers_of_pytorch(page: Page) -> None:
    test = data.load("mnist-5k", "cpu").test
    images = data.to_input(test.images)
    with torch.no_grad():
        expected = {name: demo.network(name)(images) for name in demo.NETWORKS}
    rows = images.flatten(1).tolist()
    every = "rows => Promise.all(rows.map(row => kdDraw.answers(row)))"
    found = page.evaluate(every, rows)
    for name, logits in expected.items():
        got = torch.tensor([one[name] for one in found])
        torch.testing.assert_close(got, logits, atol=2e-3, rtol=1e-4)
        assert torch.equal(got.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawing_becomes_the_image_of_the_python_reference(page: Page, digit: int) -> None:
    draw(page, STROKES[digit])
    ink = torch.tensor(page.evaluate("[...kdDraw.ink()]")).view(280, 280)
    pixels = torch.tensor(page.evaluate("kdDraw.pixels()")).view(28, 28)
    torch.testing.assert_close(pixels, demo.prepared(ink), atol=1e-5, rtol=0)
    rows, columns = ((pixels > 0).any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) == 19  # MNIST's box of 20 pixels


@pytest.mark.parametrize("digit", STROKES)
def test_the_networks_read_a_drawn_digit(page: Page, digit: int) -> None:
    draw(page, STROKES[digit])
    texts = page.locator("#kd-draw [data-network] span").all_text_contents()
    assert [text[0] for text in texts] == [str(digit)] * 3
    label = page.locator("#kd-draw .kd-bars").first.get_attribute("aria-label")
    assert re.fullmatch(r"teacher: (\d: [\d.]+ %(, )?){10}", label or "")


def test_an_example_is_chosen_from_the_keyboard_and_softened(page: Page) -> None:
    button = page.locator("#kd-draw [data-label='3']")
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#kd-draw [role=status]').textContent")
    assert page.locator("#kd-draw [data-network=teacher] span").text_content()[0] == "3"
    status = page.locator("#kd-draw [role=status]")
    before = status.text_content()
    page.locator("#kd-draw input[type=range]").focus()
    page.keyboard.press("End")
    assert page.locator("#kd-draw output").text_content() == "20"
    assert status.text_content() != before
    assert "shared with the teacher at T = 20" in page.locator(".kd-agreement").text_content()
    page.keyboard.press("Home")


def test_the_weights_are_loaded_at_the_first_stroke_only(browser: Browser, page: Page) -> None:
    with open_context(browser) as context:
        fresh = context.new_page()
        asked: list[str] = []
        fresh.on("request", lambda request: asked.append(Path(request.url).name))
        fresh.goto(page.url)
        assert "draw-weights.js" not in asked
        draw(fresh, STROKES[1])
        assert "draw-weights.js" in asked


def test_the_weights_fit_a_page() -> None:
    assert len(demo.script()) < 3.5e6


def test_a_drawing_without_ink_is_refused() -> None:
    with pytest.raises(ValueError, match="has no ink: draw something"):
        demo.prepared(torch.zeros(280, 280))
