"""How the lab measures: predictions, comparisons, layers, latency and memory of a candidate."""
