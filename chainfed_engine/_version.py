"""The version, once: pyproject.toml, CMakeLists.txt and the native module all read it from here."""

__version__ = "0.1.0"
