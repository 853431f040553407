"""How many random examples a test takes from hypothesis.

They are the same in every run (derandomize): a test suite that fails now and then is one that nobody believes.
"""

from __future__ import annotations

from hypothesis import settings

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, database=None)
