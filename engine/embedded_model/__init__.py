"""The models that ship inside the package, so that nothing is downloaded: small Llamas of which each does one thing.

The recall model, which a newcomer runs first, recalls facts told earlier in a conversation, so that a broken cache shows as a
wrong answer. The tools model went on from it and calls tools. This module only says where the files are;
`tools/embedded_model` of the repository generated and trained them.
"""

from pathlib import Path

EMBEDDED_MODEL_NAME = "pensieve-recall-0.6m"
TOOLS_MODEL_NAME = "pensieve-tools-0.6m"


def embedded_model_path() -> Path:
    """Directory of config, weights, tokenizer and chat template, as transformers' `from_pretrained` loads."""
    return Path(__file__).parent / "weights"


def tools_model_path() -> Path:
    """The same of the model that calls tools."""
    return Path(__file__).parent / "tools_weights"
