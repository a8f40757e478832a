"""The Flower app as a folder that `flwr run` packs: a server app and a client app, each a few lines over the engine."""
