"""What is measured about a candidate: fidelity, size, weights, memory, latency."""
