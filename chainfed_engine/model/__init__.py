"""Architectures, conversion and the layer store: everything that knows what a model is made of."""
