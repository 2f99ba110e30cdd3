"""The page in a real browser, headless Chromium, against the application over the embedded model's engine with tiny tiers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from deployments.generation import DeltaItem
from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.dialogue.formats import AnswerFormat
from engine.dialogue.reasoning import REASONING_FORMATS
from engine.text.output import OutputDelta
from tests.deployments.conftest import ScriptedEngine
from tests.deployments.engine_here import EngineHere
from tests.deployments.serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no headless browser is installed (Debian: apt-get install chromium chromium-driver)", allow_module_level=True
    )
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")

from selenium.common.exceptions import (  # noqa: E402
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.slow

WAIT_S = 60.0
KEYS = {"acme": "sk-acme", "other": "sk-other"}
# PENSIEVE_SCREENSHOTS: a folder for pictures of the tested state, as docs/images has them (-k forced_evictions).
SCREENSHOTS = os.environ.get("PENSIEVE_SCREENSHOTS")


def wait_for(condition: Callable[[], Any]) -> Any:
    """What it returns as soon as that is something."""
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            if result := condition():
                return result
        except (NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException):
            pass  # the page is being drawn
        assert time.monotonic() < end_s, "it does not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless",
        "no-sandbox",  # which root needs
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """What a user does at the page, and sees there."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.set_window_size(1280, 940)
        browser.get(address)
        browser.get_log("browser")  # of the pages before
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(address)

    def one(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, css))

    def text(self, css: str) -> str:
        return "\n".join(self.texts(css)[:1])

    def texts(self, css: str) -> list[str]:
        """Of all that fits, in one go: the page may be drawn anew at any time."""
        read = "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText.trim())"
        return list(self.browser.execute_script(read, css))

    def click(self, css: str) -> None:
        wait_for(lambda: self.one(css).click() or True)

    def start(self, temperature: str = "0") -> None:
        wait_for(lambda: self.text("#model"))
        field = self.one("#temperature")
        field.clear()
        field.send_keys(temperature)

    def ask(self, text: str) -> str:
        """The answer, when it is complete."""
        num_before = len(self.answers())
        self.one("#input").send_keys(text, Keys.ENTER)
        self.wait_for_answer(num_before + 1)
        return self.answers()[-1]

    def wait_for_answer(self, number: int) -> None:
        wait_for(lambda: len(self.answers()) == number and self.is_idle() and self.all("#messages .regenerate"))

    def is_idle(self) -> bool:
        return bool(self.one("#send").is_displayed())

    def answers(self) -> list[str]:
        return self.texts("#messages .assistant .text")

    def questions(self) -> list[str]:
        return self.texts("#messages .user .text")

    def cached_tokens(self) -> int:
        """As the last answer says it."""
        note = self.text("#messages li:last-child .tools")
        return int(note.partition(" tokens cached")[0]) if "tokens cached" in note else -1

    def titles(self) -> list[str]:
        return self.texts("#conversations .open")

    def states(self, title: str) -> list[str]:
        """Of the cells in that conversation's row."""
        read = """
            const row = [...document.querySelectorAll("#rows .row")].find(
                (row) => row.querySelector(".name").textContent === arguments[0]);
            return [...row?.querySelectorAll(".cell") ?? []].map((cell) => cell.classList.item(1));
        """
        return list(self.browser.execute_script(read, title))

    def take_picture(self, name: str) -> None:
        if SCREENSHOTS is not None:
            time.sleep(1.0)  # colours change slowly
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def check_console(self) -> None:
        """Nothing was refused by the page's policy, and no script failed."""
        said = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert [message for message in said if "status of 4" not in message] == []


@dataclass
class Served:
    """An application with tiny tiers and its engine."""

    engine: EngineHere
    address: str


@contextmanager
def serve_tiny(folder: Path, **changes: object) -> Iterator[Served]:
    options = {"num_threads": 1, "dtype": "float32", "chunk_size": 4, "num_gpu_blocks": 64, "num_cpu_blocks": 64}
    url = f"sqlite:///{folder / 'conversations.db'}"
    engines: list[EngineHere] = []

    async def make_app() -> FastAPI:
        config = EngineConfig.from_options({**options, "max_model_len": 256, **changes})
        engines.append(EngineHere(config, stream_interval_s=0.0, drain_s=60.0))
        return create_app(engines[0], IngressConfig(store_url=url, demo=True), ingress_id="i")

    async def end() -> None:
        await engines[0].check_integrity()
        await engines[0].__del__()

    with serving(make_app, end) as address:
        yield Served(engines[0], address)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_tiny(tmp_path_factory.mktemp("store")) as served:
        yield served


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Page]:
    page = Page(chromium, served.address)
    page.start()
    yield page
    page.check_console()


def test_chat_and_its_chunks(page: Page) -> None:
    assert "Rex" in page.ask("my dog is called Rex")
    assert page.cached_tokens() == 0
    assert "Rex" in page.ask("what is my dog called?")
    assert page.cached_tokens() > 10
    assert "first token after" in page.text("#messages li:last-child .tools")
    assert page.titles() == ["my dog is called Rex"]
    wait_for(
        lambda: len(page.states("my dog is called Rex")) > 5 and set(page.states("my dog is called Rex")) == {"gpu"}
    )
    # By keyboard: the cell and what there is to say of it.
    page.browser.execute_script("document.querySelector('#rows .current .cells').focus()")
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    wait_for(lambda: "chunk 1, tokens 4 to 7: in the GPU tier; idle for" in page.text("#detail"))
    assert "retention value" in page.text("#detail")
    wait_for(lambda: "blocks used" in page.text(".tier.gpu") and "GPU tier" in page.text(".hits"))


def test_what_was_said_is_there_after_a_reload(page: Page) -> None:
    page.ask("i live in Rome")
    said = page.questions(), page.answers()
    page.browser.refresh()
    wait_for(lambda: (page.questions(), page.answers()) == said)


def test_edit_an_earlier_message(page: Page) -> None:
    page.ask("my cat is called Mia")
    page.ask("what is my cat called?")
    page.click("#messages li:first-child .edit")
    field = wait_for(lambda: page.one("#messages textarea"))
    field.clear()
    field.send_keys("my cat is called Tom", Keys.ENTER)
    page.wait_for_answer(1)
    assert page.questions() == ["my cat is called Tom"]
    assert "Tom" in page.answers()[0]
    assert page.titles() == ["my cat is called Mia (edited)", "my cat is called Mia"]
    wait_for(lambda: page.states("my cat is called Mia (edited)") and page.states("my cat is called Mia"))
    page.click("#conversations li:last-child .open")
    wait_for(lambda: page.questions() == ["my cat is called Mia", "what is my cat called?"])


def test_fork(page: Page) -> None:
    page.ask("my cat is called Mia")
    page.ask("what is my cat called?")
    page.click("#messages .assistant .fork")
    wait_for(lambda: len(page.titles()) == 2 and page.questions() == ["my cat is called Mia"])
    assert "Mia" in page.ask("what is my cat called?")
    assert page.cached_tokens() > 10  # of the conversation that it was forked from
    assert page.titles() == ["my cat is called Mia (fork)", "my cat is called Mia"]
    wait_for(lambda: page.states("my cat is called Mia (fork)"))


def test_regenerate(page: Page) -> None:
    first = page.ask("my cat is called Mia")
    page.browser.execute_script("document.querySelector('#messages .assistant').dataset.old = 1")
    page.click("#messages .regenerate")
    wait_for(lambda: not page.all("#messages [data-old]"))
    page.wait_for_answer(1)
    assert (page.questions(), page.answers()) == (["my cat is called Mia"], [first])
    page.browser.refresh()
    wait_for(lambda: (page.questions(), page.answers()) == (["my cat is called Mia"], [first]))


def test_rename_and_delete(page: Page) -> None:
    page.ask("i live in Rome")
    page.click("#conversations .rename")
    page.one("#conversations input").send_keys(Keys.CONTROL, "a", Keys.NULL, "Where I live", Keys.ENTER)
    wait_for(lambda: page.titles() == ["Where I live"])
    wait_for(lambda: page.states("Where I live"))
    page.click("#new")
    wait_for(lambda: page.questions() == [])
    page.ask("my cat is called Mia")
    page.click("#conversations li:last-child .delete")
    assert len(page.titles()) == 2  # it asks first
    page.click("#conversations li:last-child .delete")
    wait_for(lambda: page.titles() == ["my cat is called Mia"])


def test_forced_evictions(page: Page) -> None:
    """Of the older conversation first; and no answer changes."""
    page.ask("my cat is called Mia")
    old = page.ask("what is my cat called?")
    page.click("#new")
    wait_for(lambda: page.questions() == [])
    page.ask("i live in Rome")
    wait_for(lambda: page.states("my cat is called Mia"))
    page.take_picture("page")
    assert "None" in page.text("#evictions")
    page.click("#shrink")
    wait_for(lambda: "held back" in page.text(".tier.gpu"))
    # How often it takes depends on what the tests before this one have left in the tiers.
    wait_for(lambda: "dropped" in page.states("my cat is called Mia") or page.click("#shrink"))
    wait_for(lambda: page.all("#evictions li[data-reason]"))
    assert "retention value" in page.text("#evictions")
    wait_for(lambda: not {"storing", "loading"} & set(page.states("my cat is called Mia")))
    page.take_picture("page-evictions")
    page.click("#conversations li:last-child .open")
    wait_for(lambda: len(page.questions()) == 2)
    assert page.ask("what is my cat called?") == old
    page.click("#restore")
    wait_for(lambda: "held back" not in page.text(".tier.gpu"))


def test_a_disk_tier_is_shown(chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of its own, the chunks that are there alone, and what an answer took from it."""
    monkeypatch.setattr(LoadPrices, "note_load", lambda *_: None)  # any load is cheap
    folders = {"kv_disk_path": str(tmp_path / "kv"), "kv_disk_size": 0.01}
    with serve_tiny(tmp_path, **folders) as served:
        page = Page(chromium, served.address)
        page.start()
        page.ask("my cat is called Mia")
    with serve_tiny(tmp_path, **folders) as served:
        page = Page(chromium, served.address)
        wait_for(lambda: "blocks used" in page.text(".tier.disk"))
        assert int(page.text(".tier.disk .numbers").partition(" of ")[0]) > 0
        assert "disk" in page.texts("#legend li")
        page.start()
        page.ask("my cat is called Mia")
        assert "from disk" in page.text("#messages li:last-child .tools")
        wait_for(lambda: ", disk " in page.text(".hits .numbers"))
        page.take_picture("page-disk")
        page.check_console()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (800, 700), (390, 800)])
def test_nothing_is_wider_than_the_window(page: Page, width: int, height: int) -> None:
    page.browser.set_window_size(width, height)
    page.ask("my cat is called Mia")
    wait_for(lambda: page.states("my cat is called Mia"))
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.one("#send").is_displayed()


def test_nobody_looks_while_the_page_is_hidden(page: Page, served: Served) -> None:
    wait_for(lambda: "blocks used" in page.text(".tier.gpu"))
    page.browser.get("about:blank")
    time.sleep(2.0)
    num_looks = served.engine.num_looks
    time.sleep(2.0)
    assert served.engine.num_looks == num_looks


# -- what a model may write --------------------------------------------------------------------------------------------

HOSTILE = """# A **title**

<img src=x onerror=document.title='run'> <script>document.title='run'</script>

- one `code<b>`
- [safe](https://example.org/a) and [not](javascript:alert(1))

1. first

```html
<b>no markup</b>
```

> quoted *words*
"""


@pytest.fixture
def scripted() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def scripted_page(chromium: Any, scripted: ScriptedEngine, tmp_path: Path) -> Iterator[Page]:
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'store.db'}")

    async def map_cache(query: Any) -> list[Any]:
        return []

    scripted.map_cache = map_cache  # type: ignore[attr-defined]

    async def make_app() -> FastAPI:
        return create_app(scripted, config, ingress_id="i")

    with serving(make_app) as address:
        page = Page(chromium, address)
        page.start()
        yield page
        page.check_console()
        page.browser.get("about:blank")


def test_an_answer_is_markdown_and_never_markup(scripted_page: Page, scripted: ScriptedEngine) -> None:
    page = scripted_page
    scripted.items = [DeltaItem(OutputDelta(HOSTILE, (1,), (), (), 5, 3, 1, "stop"), 0)]
    page.ask("<b>hi</b>")
    assert page.questions() == ["<b>hi</b>"]
    assert page.browser.title == "Pensieve"
    answer = "#messages .assistant .text"
    assert not page.all(f"{answer} img, {answer} script, {answer} b")
    assert page.text(f"{answer} h3 strong") == "title"
    assert page.text(f"{answer} ul code") == "code<b>"
    assert page.text(f"{answer} pre") == "<b>no markup</b>"
    assert page.text(f"{answer} ol li") == "first"
    assert page.text(f"{answer} blockquote em") == "words"
    (link,) = page.all(f"{answer} a")
    assert (link.text, link.get_attribute("href")) == ("safe", "https://example.org/a")
    assert "noopener" in link.get_attribute("rel")
    assert "[not](javascript:alert(1))" in page.text(answer)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(scripted_page: Page, scripted: ScriptedEngine) -> None:
    page = scripted_page
    scripted.items, scripted.hangs = [DeltaItem(OutputDelta("so far", (1,), (), (), 5, 3, 1), 0)], True
    page.one("#input").send_keys("tell me everything", Keys.ENTER)
    wait_for(lambda: page.answers() == ["so far"])
    page.click("#stop")
    wait_for(page.is_idle)
    wait_for(lambda: scripted.num_running == 0)
    page.browser.refresh()
    wait_for(lambda: (page.questions(), page.answers()) == (["tell me everything"], ["so far"]))


def test_what_was_thought_is_apart_from_the_answer_and_goes_with_it(
    scripted_page: Page, scripted: ScriptedEngine
) -> None:
    page = scripted_page
    form = AnswerFormat(reasoning=REASONING_FORMATS["qwen3"], thinking_state="open")
    begun = OutputDelta("<b>hm</b>", (1,), (), (), 5, 3, 1, answer_format=form)
    scripted.items, scripted.hangs = [DeltaItem(begun, 0)], True
    page.one("#input").send_keys("well?", Keys.ENTER)
    wait_for(lambda: page.all("#messages .thought[open]") and page.text("#messages .thought div") == "<b>hm</b>")
    page.click("#stop")
    wait_for(page.is_idle)
    page.click("#new")
    wait_for(lambda: page.questions() == [])

    scripted.items, scripted.hangs = (
        [
            DeltaItem(begun, 0),
            DeltaItem(OutputDelta("</think>\n\nyes", (2,), (), (), 5, 3, 2, "stop"), 0),
        ],
        False,
    )
    page.ask("well?")

    def is_shown() -> bool:
        return page.texts("#messages .assistant .text > :last-child") == ["yes"] and page.texts(
            "#messages .thought:not([open]) summary"
        ) == ["Thinking"]

    wait_for(is_shown)
    page.browser.refresh()
    wait_for(is_shown)
    page.click("#messages .thought summary")
    wait_for(lambda: page.text("#messages .thought div") == "<b>hm</b>")
    page.click("#messages .fork")
    wait_for(lambda: len(page.titles()) == 3 and is_shown())
    page.ask("and now?")
    page.browser.execute_script("document.querySelector('#messages .assistant').dataset.old = 1")
    page.click("#messages .regenerate")
    wait_for(lambda: not page.all("#messages [data-old]") and page.is_idle())
    page.browser.refresh()
    wait_for(lambda: page.questions() == ["well?", "and now?"] and len(page.all("#messages .thought")) == 2)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_with_keys_it_asks_for_one_and_shows_what_is_its_own(chromium: Any, tmp_path: Path) -> None:
    tenants = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),)) for name, key in KEYS.items())
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'store.db'}", tenants=tenants, demo=True)
    engines: list[EngineHere] = []

    async def make_app() -> FastAPI:
        engines.append(
            EngineHere(EngineConfig.from_options({"num_threads": 1, "num_gpu_blocks": 64}), stream_interval_s=0.0)
        )
        return create_app(engines[0], config, ingress_id="i")

    async def end() -> None:
        await engines[0].__del__()

    with serving(make_app, end) as address:
        page = Page(chromium, address)
        give_key(page, "nonsense")
        wait_for(lambda: page.text("#key-reason").startswith("That key is not known"))
        give_key(page, KEYS["acme"])
        page.start()
        page.ask("my cat is called Mia")
        wait_for(lambda: page.states("my cat is called Mia"))
        page.browser.execute_script("sessionStorage.clear(); localStorage.clear()")
        page.browser.refresh()
        give_key(page, KEYS["other"])
        page.start()
        page.ask("my cat is called Tom")
        wait_for(lambda: page.states("my cat is called Tom"))
        assert len(page.all("#rows .row")) == 1
        assert not page.one("#demo").is_displayed()
        page.check_console()
        page.browser.get("about:blank")


def give_key(page: Page, key: str) -> None:
    wait_for(lambda: page.one("#key-dialog").is_displayed())
    page.one("#key").send_keys(key, Keys.ENTER)
