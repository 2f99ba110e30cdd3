"""The systems of the comparison: how each is started, and on which form of the model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import conversion
import model as peer_model

NAMES = ("pensieve", "stateless", "openvino", "transformers", "llama_cpp")


@dataclass(frozen=True, slots=True)
class System:
    """One system of the comparison.

    python, script, arguments: how its runner starts.
    model: what it reads; `make_model`, which gets its path, makes it if it is missing.
    needs: what setup.sh leaves; without it the system is left out.
    """

    name: str
    python: Path
    script: str
    arguments: tuple[str, ...]
    model: Path
    make_model: Callable[[Path], None]
    needs: tuple[Path, ...] = ()


def build_systems(model: str, dtype: str, weights: str, venvs: Path, models: Path) -> dict[str, System]:
    """Those that can have such weights, by name.

    model: one of peer_model.VOCAB_SIZES.
    weights: one of conversion.WEIGHTS.
    venvs: the folder given to setup.sh.
    models: where the models are kept.
    """
    folder = models / model / dtype
    hugging_face, ov, gguf = folder / "hf", folder / f"openvino-{weights}", folder / f"gguf-{weights}"
    here, convert = Path(sys.executable), venvs / "convert/.installed"
    server = venvs / "llama_cpp/build/bin/llama-server"
    quantization = ("--quantization", "none" if weights == "same" else weights)

    def make_hf(path: Path) -> None:
        save = peer_model.save_smollm2 if model == "smollm2" else peer_model.save_model
        save(path, dtype)

    def make_ov(path: Path) -> None:
        conversion.convert_to_openvino(hugging_face, path, weights, venvs)

    def make_gguf(path: Path) -> None:
        conversion.convert_to_gguf(hugging_face, path, dtype, weights, venvs)

    systems = [
        System("pensieve", here, "run_pensieve.py", ("--mode", "pensieve", *quantization), hugging_face, make_hf),
        System("stateless", here, "run_pensieve.py", ("--mode", "stateless", *quantization), hugging_face, make_hf),
        System(
            "openvino",
            venvs / "openvino/bin/python",
            "run_openvino.py",
            (),
            ov,
            make_ov,
            (venvs / "openvino/.installed", convert),
        ),
        System("llama_cpp", here, "run_llama_cpp.py", ("--server", str(server)), gguf, make_gguf, (server, convert)),
    ]
    if weights == "same":
        systems.append(System("transformers", here, "run_transformers.py", (), hugging_face, make_hf))
    return {system.name: system for system in systems}


def make_models(systems: list[System]) -> None:
    """Those that are missing."""
    for system in systems:
        if system.model.exists():
            continue
        print(f"making {system.model}")
        part = system.model.with_name(f"part-{system.model.name}")  # an interrupted run leaves no half of a model
        if part.is_dir():
            shutil.rmtree(part)
        system.make_model(part)
        part.rename(system.model)
