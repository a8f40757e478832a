"""The program `chainfed`. Nothing in the package imports this folder."""
