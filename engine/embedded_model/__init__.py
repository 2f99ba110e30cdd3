"""The model a newcomer runs first: a small Llama that ships inside the package, so nothing is downloaded.

It recalls facts told earlier in a conversation, which makes a broken cache visible as a wrong answer. This
module only says where the files are; `tools/embedded_model` of the repository generated and trained it.
"""

from pathlib import Path

EMBEDDED_MODEL_NAME = "pensieve-recall-0.6m"


def embedded_model_path() -> Path:
    """Directory of config, weights, tokenizer and chat template, as transformers' `from_pretrained` loads."""
    return Path(__file__).parent / "weights"
