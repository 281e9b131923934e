"""Whether the handlers and `flash_sources` fit together: a process is about one source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import ConfigurationError, SubscriptionError
from ..handlers.subscriptions import Subscription
from ..provisioning.findings import OK, STOP, Finding
from ..settings import Settings


def check(settings: Settings, subscriptions: Sequence[Subscription], source: str) -> None:
    """Raise `SubscriptionError` if a handler names an unknown source, or none names this one.

    `settings` are the default source's, `subscriptions` those of all sources.
    """
    for one in subscriptions:
        try:
            if one.source:
                settings.of_source(one.source)
        except ConfigurationError as error:
            raise SubscriptionError(f"{one.handler}: {error}") from None
    named = sorted({one.source for one in subscriptions})
    if source in named:
        return
    if source:
        raise SubscriptionError(
            f'No handler names the source {source}; declare one by on_change("{source}:…"), or '
            "import the module that does."
        )
    if named:
        raise SubscriptionError(
            "Every handler names a source, so there is nothing to do without one; "
            f"choose by --source: {', '.join(named)}."
        )


def findings(
    settings: Settings, subscriptions: Sequence[Subscription], source: str
) -> Iterator[Finding]:
    """The same for `doctor`, and which other sources there are."""
    try:
        check(settings, subscriptions, source)
    except SubscriptionError as error:
        yield Finding("sources", STOP, str(error), error)
    if not source and settings.flash_sources:
        others = ", ".join(settings.flash_sources)
        yield Finding("other sources", OK, f"{others} (flash doctor --source NAME)")
