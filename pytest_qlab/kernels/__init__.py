"""Modules that run packed weights."""
