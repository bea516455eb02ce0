"""A real browser, and what a test does in it as a user would."""
import asyncio
import contextlib
import json
import os
import pytest
import shutil
import socket
import threading
from typing import Any, Iterator, List, Tuple

# Longer than anything takes where others use the machine, too.
SECONDS = 120


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium, Debian's. Where there is none a test skips, or fails with REQUIRE_BROWSER set."""
    missing = [name for name in ('chromium', 'chromedriver') if shutil.which(name) is None]
    if not os.environ.get('REQUIRE_BROWSER'):
        pytest.importorskip('selenium', reason='selenium is not installed')
        if missing:
            pytest.skip(f'not installed (Debian: chromium, chromium-driver): {", ".join(missing)}')
    assert not missing, 'apt-get install chromium chromium-driver'
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    # As root and in containers there is no sandbox, and little shared memory.
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1280,1200',
                     '--hide-scrollbars'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    # Named, or selenium would look for one in the network.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def serving(build: Any) -> Iterator[Tuple[Any, str]]:
    """Serves, in a thread, what `build` makes for an address: its `app`, and `end`; yields it and that address."""
    import uvicorn

    class Server(uvicorn.Server):

        async def shutdown(self, *args: Any, **kwargs: Any) -> None:
            ending = asyncio.ensure_future(served.end())
            await super().shutdown(*args, **kwargs)
            ending.cancel()

    with socket.create_server(('127.0.0.1', 0)) as listening:
        url = f'http://127.0.0.1:{listening.getsockname()[1]}'
        served = build(url)
        server = Server(uvicorn.Config(served.app, log_level='warning'))
        thread = threading.Thread(target=server.run, args=([listening], ))
        thread.start()
        try:
            yield served, url
        finally:
            server.should_exit = True
            thread.join()


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        # What was asked for before is of another page.
        driver.get_log('performance')
        driver.get(url)

    def wait(self, condition: Any) -> Any:
        """Waits until something is true, and returns it."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(
            self.driver, SECONDS, ignored_exceptions=[StaleElementReferenceException]).until(lambda _: condition())

    def all(self, selector: str) -> List[Any]:
        return self.driver.find_elements('css selector', selector)

    def one(self, selector: str) -> Any:
        """Waits for what a user can see."""
        return self.wait(lambda: next((e for e in self.all(selector) if e.is_displayed()), None))

    def log_in(self, password: str) -> None:
        for field, text in ((self.one('input:not([type=password])'), 'anybody'), (self.one('input[type=password]'),
                                                                                  password)):
            field.clear()
            field.send_keys(text)
        self.one('button').click()

    def wait_until_loaded(self) -> None:
        """Waits for the adapters that the page begins with."""
        self.wait(lambda: self.picked('A') and self.weights('B'))

    def picked(self, name: str) -> List[str]:
        return [token.text for token in self.all(f'#adapters-{name} .token')]

    def pick(self, name: str, adapter: str) -> None:
        """Types the name of an adapter and takes what is offered."""
        from selenium.webdriver.common.keys import Keys
        field = self.one(f'#adapters-{name} input')
        field.click()
        field.send_keys(adapter)
        self.wait(lambda: [e.text for e in self.all('ul[role=listbox] li')] == [adapter])
        field.send_keys(Keys.ENTER, Keys.ESCAPE)
        self.wait(lambda: any(adapter in line for line in self.weights(name)))

    def unpick(self, name: str, index: int) -> None:
        before = self.weights(name)
        self.all(f'#adapters-{name} .token-remove')[index].click()
        self.wait(lambda: self.weights(name) != before)

    def weights(self, name: str) -> List[str]:
        """Returns the name and the weight of each slider that is there."""
        sliders = [e for e in self.all(f'[id^=weight-{name}-]') if e.is_displayed()]
        return [f'{e.text.splitlines()[0]}={self._value(e)}' for e in sliders]

    def _value(self, slider: Any) -> str:
        return slider.find_element('css selector', 'input[type=number]').get_attribute('value')

    def move(self, name: str, slot: int, steps: int) -> None:
        """Moves a slider by the keyboard."""
        from selenium.webdriver.common.keys import Keys
        slider = self.one(f'#weight-{name}-{slot} input[type=range]')
        slider.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))

    def show_settings(self) -> None:
        self.one('#settings > button').click()

    def show_columns(self, count: int) -> None:
        self.one(f'#count label:nth-of-type({count - 1})').click()
        self.wait(lambda: len([e for e in self.all('[id^=result-]') if e.is_displayed()]) == count)

    def ask(self, question: str, by_enter: bool = False) -> None:
        from selenium.webdriver.common.keys import Keys
        field = self.one('#question textarea')
        field.clear()
        field.send_keys(question)
        if by_enter:
            field.send_keys(Keys.ENTER)
        else:
            self.one('#ask').click()

    def wait_for(self, state: str, *names: str) -> None:
        for name in names:
            self.one(f'#told-{name} [data-state={state}]')

    def answer(self, name: str) -> str:
        return self.one(f'#answer-{name} textarea').get_attribute('value')

    def told(self, name: str) -> str:
        return self.one(f'#told-{name}').text

    def request(self, name: str, kind: str) -> str:
        """Opens the request of a column and returns its text: `curl` or `python`."""
        if not [e for e in self.all(f'#request-{name} [role=tab]') if e.is_displayed()]:
            self.one(f'#request-{name} > button').click()
        self.one(f'#request-{name} [role=tab]')
        next(e for e in self.all(f'#request-{name} [role=tab]') if e.text.lower() == kind).click()
        return '\n'.join(
            line.text for line in self.one(f'#{kind}-{name} .cm-content').find_elements('css selector', '.cm-line'))

    def asked_for(self) -> List[str]:
        """Returns the addresses that this page loaded anything from."""
        messages = [json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance')]
        urls = [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']
        return [url for url in urls if not url.startswith(('data:', 'blob:'))]
