"""Activation statistics of linear layers, collected once and shared by all methods."""
