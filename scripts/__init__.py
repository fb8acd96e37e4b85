"""Commands that print or write what the documentation shows."""
