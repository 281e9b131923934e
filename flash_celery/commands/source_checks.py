"""Checks that the handlers and `flash_sources` fit together: a process serves one source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import ConfigurationError, SubscriptionError
from ..handlers.subscriptions import Subscription
from ..provisioning.findings import OK, STOP, Finding
from ..settings import Settings


def refuse_mismatch(settings: Settings, subscriptions: Sequence[Subscription], source: str) -> None:
    """Raise `SubscriptionError` if a handler names an unknown source, or none names this one.

    Args:
        settings: The settings of the default source.
        subscriptions: The subscriptions to all sources.
        source: The source that this process serves; "" is the default source.
    """
    for subscription in subscriptions:
        try:
            if subscription.source:
                settings.of_source(subscription.source)
        except ConfigurationError as error:
            raise SubscriptionError(f"{subscription.handler}: {error}") from None
    named = sorted({subscription.source for subscription in subscriptions})
    if source in named:
        return
    if source:
        raise SubscriptionError(
            f'No handler names the source {source}; declare one with on_change("{source}:…"), or '
            "import the module that does."
        )
    if named:
        raise SubscriptionError(
            "Every handler names a source, so the default source has none; "
            f"choose by --source: {', '.join(named)}."
        )


def findings(
    settings: Settings, subscriptions: Sequence[Subscription], source: str
) -> Iterator[Finding]:
    """Yield the error of `refuse_mismatch` as a finding, and list the other sources."""
    try:
        refuse_mismatch(settings, subscriptions, source)
    except SubscriptionError as error:
        yield Finding("sources", STOP, str(error), error)
    if not source and settings.flash_sources:
        others = ", ".join(settings.flash_sources)
        yield Finding("other sources", OK, f"{others} (flash doctor --source NAME)")
