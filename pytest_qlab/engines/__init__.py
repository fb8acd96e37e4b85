"""Other projects: their file formats, and their runtimes."""
