"""The authors' checkpoints and ours: conversion in both directions."""

from .converter import DEFAULT_SOURCE, convert, reverse

__all__ = ["DEFAULT_SOURCE", "convert", "reverse"]
