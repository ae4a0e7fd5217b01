"""A person's way: Chromium opens the app's address, waits through the loading page, moves the slider, sees the plot."""

import os

import pytest
from chromium import launched, move_the_slider, opened
from running_pair import HELLO, simple_app


@pytest.fixture(scope="module")
def browser():
    with launched() as chromium:
        yield chromium


@pytest.fixture
def page(browser):
    with opened(browser) as page:
        yield page


def test_the_slider_moves_the_plot(pair, page):
    pair.deploy("hello", {path.name: path.read_text() for path in HELLO.iterdir() if path.is_file()})
    page.goto(f"{pair.control_url}/app/hello/")  # the control plane's address leads to the app's own
    page.wait_for_selector("text=Hello from Blockyard")
    page.wait_for_selector("#histogram img")
    assert page.url == f"{pair.relay_origin}/app/hello/"
    move_the_slider(page)
    if directory := os.environ.get("BLOCKYARD_SCREENSHOTS"):
        page.screenshot(path=f"{directory}/hello.png")


def test_the_loading_page_turns_into_the_app_by_itself(pair, page):
    pair.deploy("slow-start", simple_app("Sys.sleep(1)"))
    page.goto(f"{pair.relay_origin}/app/slow-start/")
    assert "starting" in page.inner_text("main")
    page.wait_for_selector("text=plain page")


def test_a_failed_start_is_shown_with_a_way_to_try_again(pair, page):
    pair.deploy("failing", simple_app("stop('no')"))
    page.goto(f"{pair.relay_origin}/app/failing/")
    page.wait_for_selector("text=could not start")
    page.wait_for_selector("text=Try again")


def test_a_private_app_shows_a_page_that_says_so(pair, page):
    pair.deploy("private", simple_app(), access_type="acl")
    assert page.goto(f"{pair.relay_origin}/app/private/").status == 401
    assert "not public" in page.inner_text("main")


def test_a_page_of_another_origin_cannot_read_the_control_plane(pair, page):
    pair.deploy("hello-two", simple_app())
    page.goto(f"{pair.relay_origin}/app/hello-two/")
    page.wait_for_selector("text=plain page")
    outcome = page.evaluate(
        "url => fetch(url, {credentials: 'include'}).then(r => r.text(), e => 'refused')", f"{pair.control_url}/readyz"
    )
    assert outcome == "refused"
