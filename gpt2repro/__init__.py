"""The library behind the scripts: data, training and the Hub, each a room of its own."""

__version__ = "0.1.0"
