"""The base model: loading it, finding its linear layers, and its function-preserving folds."""
