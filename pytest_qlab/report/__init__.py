"""Views of the results document: terminal, HTML, Markdown, CSV, pytest-benchmark's JSON.

Every function here is pure: a results document in, text out. Nothing imports torch or pytest.
"""
