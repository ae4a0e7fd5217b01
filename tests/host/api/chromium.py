"""A person's browser, and his hand on the slider of examples/hello."""

from contextlib import contextmanager

from playwright.sync_api import sync_playwright

PLACE = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@contextmanager
def launched(*arguments):
    """A running Chromium."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PLACE, args=[*ARGUMENTS, *arguments], timeout=60_000)
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium, **options):
    """A page of a visitor of its own."""
    context = chromium.new_context(**options)
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()


def move_the_slider(page):
    """Click elsewhere on the slider, and wait for another plot."""
    before = _picture(page)
    slider = page.locator(".irs-line").bounding_box()
    page.mouse.click(slider["x"] + slider["width"] * 0.2, slider["y"] + slider["height"] / 2)
    page.wait_for_function("before => document.querySelector('#histogram img').src !== before", arg=before)
    assert _picture(page) != before


def _picture(page):
    return page.locator("#histogram img").get_attribute("src")
