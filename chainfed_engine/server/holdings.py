"""Who holds which version of each parameter: what need not be sent again. Names and fingerprints only, no arrays."""

from collections.abc import Iterable, Mapping


class Holdings:
    """A client we know nothing of holds nothing."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, str]] = {}

    def lacking(self, client: str, versions: Mapping[str, str]) -> list[str]:
        """Keys of `versions` that the client has to be sent, in the order of `versions`."""
        held = self._held.get(client, {})
        return [key for key, version in versions.items() if held.get(key) != version]

    def confirm(self, client: str, versions: Mapping[str, str]) -> None:
        """The client answered a task with these versions, so it has them."""
        self._held.setdefault(client, {}).update(versions)

    def forget_keys(self, keys: Iterable[str]) -> None:
        """No client is taken to hold these any more."""
        for held in self._held.values():
            for key in keys:
                held.pop(key, None)

    def forget_outdated(self, current: Mapping[str, str]) -> None:
        """Versions other than these are gone: clients that share a process let go of them, and one may come again, for
        eight bits take few values."""
        for held in self._held.values():
            for key in [key for key, version in current.items() if held.get(key, version) != version]:
                del held[key]

    def forget(self, client: str) -> None:
        """After an error nothing is known of the client; it gets everything anew."""
        self._held.pop(client, None)
