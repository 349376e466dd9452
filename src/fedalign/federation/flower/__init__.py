"""Flower as the engine: stock processes carry our messages between sites and coordinator."""
