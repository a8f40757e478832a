"""The global parameters a client holds: what tasks brought, kept until a newer version comes. References, no copies."""

from collections.abc import Mapping

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays, Task


class HeldParameters:
    def __init__(self) -> None:
        self._arrays: Arrays = {}
        self._versions: dict[str, str] = {}

    def take(self, task: Task) -> Arrays:
        """Merge what the task brings; returns exactly the parameters it names. Raises InvalidArgument for a gap:
        the server believes in something this client does not hold, and sends all of it after the error."""
        for key, array in task.arrays.items():
            version = task.versions.get(key)
            if version is None:
                raise InvalidArgument(f"task {task.round_id}: {key} came without a version")
            self._arrays[key], self._versions[key] = array, version
        lacking = [key for key, version in task.versions.items() if self._versions.get(key) != version]
        if lacking:
            raise InvalidArgument(
                f"task {task.round_id}: {len(lacking)} parameters are missing here, first {lacking[0]}"
            )
        return {key: self._arrays[key] for key in task.versions}

    def forget_outdated(self, current: Mapping[str, str]) -> None:
        """Let go of arrays that have a newer version: no task will name the old one again."""
        for key, version in current.items():
            if key in self._versions and self._versions[key] != version:
                del self._versions[key], self._arrays[key]
