"""Simulated systems: the engine's own policies with computed step times. No torch."""
