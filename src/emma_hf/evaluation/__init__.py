"""Benchmarks: tasks, metrics and how sure a figure is."""

from .statistics import paired_difference, paired_mean_difference, share

__all__ = ["paired_difference", "paired_mean_difference", "share"]
