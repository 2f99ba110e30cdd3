"""What a process of this folder needs before torch and triton are imported.

Imported first by everything that is started. The repository does not have to be installed: its root and the folders of the
benchmarks come first on the path. Nothing is downloaded, and what compilers keep is in a folder of this checkout, so that the
processes of one run share it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHES = ROOT / ".gpu_caches"
IS_SMOKE = "--smoke" in sys.argv

for _folder in (ROOT / "benchmarks/peers", ROOT / "benchmarks", ROOT / "benchmarks/gpu", ROOT):
    sys.path.insert(0, str(_folder))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
if IS_SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
