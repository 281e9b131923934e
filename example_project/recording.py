"""`make recording`: film the demo's page for the README, from a run of `make demo`.

Writes docs/images/demo-light.png, demo-dark.png and demo.gif. The times in them are those of the
run.
"""

import base64
import io
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageColor

from example_project.servers import end_with_parent, free_port
from tests import browser

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1120, 700
COLOURS = 64
HUES = ("orm", "bulk", "sql", "outside", "handler", "green")
HUE = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"

# Adds a mouse pointer and a terminal with psql to the page.
STAGE = """
const pointer = document.createElementNS("http://www.w3.org/2000/svg", "svg");
pointer.id = "pointer";
pointer.setAttribute("viewBox", "0 0 24 24");
pointer.innerHTML = '<path d="M3 2v17l4.6-4.4 3 7 3.2-1.4-3-6.8H17z" fill="#111" stroke="#fff"/>';
pointer.style.cssText = `position: fixed; z-index: 9; width: 26px; left: 46%; top: 70%;
  transition: left .6s ease-in-out, top .6s ease-in-out, transform .12s`;
const terminal = document.createElement("pre");
terminal.id = "terminal";
terminal.style.cssText = `position: fixed; z-index: 8; left: 2rem; bottom: 1.5rem; width: 41rem;
  height: 6.6rem; padding: .9rem 1.1rem; border-radius: 10px; background: #14181b; color: #d6e2da;
  font-size: .84rem; visibility: hidden`;
document.body.append(pointer, terminal);
"""
POINT = """
const target = document.querySelector(arguments[0]);
target.scrollIntoView({block: "nearest"});
const {left, top, width, height} = target.getBoundingClientRect();
pointer.style.left = `${left + width / 2}px`;
pointer.style.top = `${top + height / 2}px`;
"""
PRESS = """
pointer.style.transform = "scale(.8)";
setTimeout(() => (pointer.style.transform = ""), 150);
document.querySelector(arguments[0]).click();
"""
TYPE = "terminal.style.visibility = 'visible'; terminal.textContent = arguments[0]"


@contextmanager
def demo():
    """Run the demo; return the addresses of its page and its database once both are ready."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "example_project.demo", "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent(signal.SIGINT),
    )
    output = ""
    for line in process.stdout:
        output += line
        if "Now you:" in line:
            break
    try:
        yield f"http://127.0.0.1:{port}", re.search(r"PostgreSQL +(\S+)", output).group(1)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


class Film:
    """A sequence of pictures of a browser's window, with their times."""

    def __init__(self, driver):
        self.driver = driver
        self.frames = []

    def roll(self, seconds):
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            self.frames.append((now, base64.b64decode(browser.picture(self.driver, whole=False))))

    def press(self, selector, seconds):
        self.driver.execute_script(POINT, selector)
        self.roll(0.9)
        self.driver.execute_script(PRESS, selector)
        self.roll(seconds)

    def psql(self, dsn, statement, seconds):
        """Type a statement in the terminal, run it with psql, and show psql's output."""
        prompt = "$ psql\nshop=# "
        for length in range(0, len(statement) + 1, 5):
            self.driver.execute_script(TYPE, prompt + statement[:length] + "▏")
            self.roll(0.05)
        command = ["psql", "--no-psqlrc", dsn, "-c", statement]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        self.driver.execute_script(TYPE, f"{prompt}{statement}\n{output}shop=# ▏")
        self.roll(seconds)

    def save(self, path):
        """Save the pictures as a GIF with one palette and the real durations."""
        images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in self.frames]
        sample = Image.new("RGB", (WIDTH, HEIGHT * 4))
        for quarter in range(4):
            sample.paste(images[(quarter + 1) * len(images) // 4 - 1], (0, quarter * HEIGHT))
        # Rare colours matter most, so each gets a share of the sample.
        hues = [self.driver.execute_script(HUE, f"--{name}") for name in HUES]
        for row, hue in enumerate([*hues, "#ffd84d", "#ffffff"]):
            sample.paste(ImageColor.getrgb(hue), (0, 50 * row, WIDTH // 2, 50 * row + 50))
        palette = sample.quantize(COLOURS, dither=Image.Dither.NONE)
        frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        times = [taken for taken, _ in self.frames]
        spans = [round((after - at) * 100) * 10 for at, after in pairwise(times)]
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=[*spans, 2500],
            loop=0,
            optimize=False,
        )


def pictures(driver, url):
    for name, dark in (("light", False), ("dark", True)):
        browser.show(driver, url, width=1280, height=880, dark=dark)
        time.sleep(2)
        image = Image.open(io.BytesIO(base64.b64decode(browser.picture(driver, whole=False))))
        image.convert("RGB").quantize(128).save(IMAGES / f"demo-{name}.png", optimize=True)


def main():
    IMAGES.mkdir(exist_ok=True)
    with demo() as (url, dsn), browser.browser() as driver:
        browser.show(driver, url, width=WIDTH, height=HEIGHT)
        time.sleep(2)
        driver.execute_script(STAGE)
        film = Film(driver)
        film.roll(0.8)
        film.press("#add", 2.4)
        film.press(".order [id^=pay-]", 2.6)
        film.press("#add", 1.6)
        film.press("#pay-all", 2.4)
        film.psql(dsn, "UPDATE shop_orderline SET quantity = 3 WHERE id = 1;", 2.5)
        film.save(IMAGES / "demo.gif")
        pictures(driver, url)
    for path in sorted(IMAGES.glob("demo*")):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
