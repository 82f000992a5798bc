"""Nexus: one mixture-of-experts out of several dense language models, and more experts later."""

__version__ = "0.1.0"
