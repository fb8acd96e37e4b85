"""Algorithms that choose codes: tensors in, tensors out; they know no model."""
