"""`make links`: asks every address in the documents whether it is there. It needs the network."""

import sys
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.docs.pages import EXTERNAL, PAGES, README


def asked(client, url):
    """Return the problem with an address, or an empty text."""
    try:
        answer = client.get(url.partition("#")[0])
    except httpx.HTTPError as error:
        return f"{url}: {type(error).__name__} {error}"
    return f"{url}: {answer.status_code}" if answer.is_error else ""


def main():
    urls = sorted({url for text in (README, *PAGES.values()) for url in EXTERNAL.findall(text)})
    headers = {"User-Agent": "Mozilla/5.0 (flash-celery, link check)"}
    with (
        httpx.Client(follow_redirects=True, timeout=30, headers=headers) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        broken = list(filter(None, pool.map(lambda url: asked(client, url), urls)))
    print(*broken, f"{len(urls)} addresses, {len(broken)} of them broken", sep="\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
