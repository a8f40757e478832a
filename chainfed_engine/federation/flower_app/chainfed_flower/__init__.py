"""Flower's two components. They hold no logic: the engine is installed where they run."""
