"""The facade over the compiled core `_native`: every public name of `_native.pyi`, unchanged.

Importing it checks that the core is built and of the package's version; otherwise `NativeUnavailable` says how to
build it. Nothing else in the package imports `_native`.
"""

from chainfed_engine._version import __version__ as _package_version
from chainfed_engine.errors import NativeUnavailable

_BUILD_HINT = "build it with `pip install .`, or in the source tree with `cmake -S . -B build && cmake --build build`"

try:
    from chainfed_engine.native._native import *  # noqa: F403
    from chainfed_engine.native._native import __version__
except ImportError as error:
    raise NativeUnavailable(f"the compiled core is missing ({error}); {_BUILD_HINT}") from error

if __version__ != _package_version:
    raise NativeUnavailable(
        f"the compiled core is version {__version__}, the package {_package_version}; {_BUILD_HINT}"
    )
