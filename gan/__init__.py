"""Generators as calibration sources."""
