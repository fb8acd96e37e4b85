"""GGUF, the model files of llama.cpp: reading, writing, and the names in them."""
