"""Tests of a plugin run small pytest projects of their own."""

pytest_plugins = ["pytester"]
