"""What a run of all tests leaves out because it takes long and something quicker shows nearly the same.

HYPOTHESIS_PROFILE=nightly runs it too.
"""

import os

import pytest

IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
nightly = pytest.mark.skipif(not IS_NIGHTLY, reason="nightly")
