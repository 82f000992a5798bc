"""Measuring speed and memory of training: the layers compared, the clock, and how cost grows."""
