"""Chromium without a screen, for the status page: in the tests, and for the pictures in docs/."""

import os
import shutil
import tempfile
from contextlib import contextmanager

BINARY, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_QUIET = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--force-color-profile=srgb"),
)


def installed():
    return bool(BINARY and DRIVER)


@contextmanager
def browser():
    """A new one, which knows nothing of any other."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in _QUIET:
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    with tempfile.TemporaryDirectory() as folder:
        options.add_argument(f"--user-data-dir={folder}")
        driver = webdriver.Chrome(options, Service(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def show(driver, url, width=1120, height=800, dark=False, scale=1.0):
    """Open a page on a screen of this size, and wait until it has something to show."""
    from selenium.webdriver.support.ui import WebDriverWait

    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    resize(driver, width, height, scale)
    driver.get(url)
    WebDriverWait(driver, 30).until(lambda one: "Loading" not in text(one, "#state"))


def resize(driver, width, height=800, scale=1.0):
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def text(driver, selector):
    from selenium.webdriver.common.by import By

    return driver.find_element(By.CSS_SELECTOR, selector).text


def picture(driver, whole=True):
    """The whole page, or what is on the screen, as PNG in base64."""
    options = {"captureBeyondViewport": whole}
    return driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
