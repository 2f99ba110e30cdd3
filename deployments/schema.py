"""The arguments of our applications, AppArgs and OpenAIAppArgs, and a check of a whole Serve config file. Starts nothing.

The file is checked against Ray's own schema, too, because Ray ignores keys that it does not know.

    python -m deployments.schema serve_config.yaml
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ValidationError, field_validator
from ray.serve.schema import ServeDeploySchema

from deployments.llm_configs import OpenAIAppArgs
from deployments.model_args import ModelArgs
from deployments.options import IngressOptions
from deployments.store.url import check_store_url
from deployments.tenants import load_tenants
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.option_names import RENAMED, unknown_option
from engine.options import options_of

IMPORT_PATH, OPENAI_IMPORT_PATH = "deployments.app:build", "deployments.app:build_openai_app"
ENGINE_DEPLOYMENT = "LLMServer"


class AppArgs(ModelArgs, IngressOptions):
    """Arguments of `deployments.app:build`.

    A change of these replaces every replica, one after the other, and with it every cache; see docs/operations.md.
    """

    @field_validator("tenants_file")
    @classmethod
    def _check_tenants(cls, path: str | None) -> str | None:
        try:
            load_tenants(path, {})
        except ConfigError as error:
            raise ValueError(error.message) from None
        return path

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, url: str | None) -> str | None:
        try:
            if url is not None:
                check_store_url(url)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return url

    @property
    def models(self) -> dict[str, ModelArgs]:
        """The one, by the name of its deployment."""
        return {ENGINE_DEPLOYMENT: self}


# Our applications, and what their arguments are.
OWN: dict[str, type[AppArgs] | type[OpenAIAppArgs]] = {IMPORT_PATH: AppArgs, OPENAI_IMPORT_PATH: OpenAIAppArgs}


def own_args(application: Mapping[str, Any]) -> AppArgs | OpenAIAppArgs | None:
    """The checked arguments of an application in a file, if it is ours. Raises ValidationError."""
    kind = OWN.get(application["import_path"])
    return None if kind is None else kind.model_validate(application.get("args") or {})


def read_serve_config(path: str | Path) -> dict[str, Any]:
    """A Serve config file as YAML reads it. Raises ConfigError, with the line and column of a mistake."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a Serve config file, such as serve_config.yaml") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{path}: {place}is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"is {type(config).__name__!r} and not a mapping"
        raise ConfigError(f"{path}: {found}; a Serve config file has the keys applications, http_options and more")
    return config


def check_serve_config(path: str | Path) -> list[str]:
    """What is wrong with a Serve config file, one line each.

    Unknown keys at any level, values that Ray's schema rejects, and arguments of our application that AppArgs rejects. Raises
    ConfigError if it is not such a file at all.
    """
    config = read_serve_config(path)
    problems = list(_unknown_keys(config, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return problems + _problems(error, "")
    for index, application in enumerate(config["applications"]):
        try:
            own_args(application)
        except ValidationError as error:
            known = OWN[application["import_path"]].model_fields
            problems += _problems(error, f"applications[{index}].args.", known)
    return problems


def _problems(error: ValidationError, prefix: str, known: Iterable[str] = ()) -> list[str]:
    """One line for each error.

    known: the keys of the model, to suggest those that may have been meant.
    """
    return [
        _unknown_key(f"{prefix}{detail['loc'][0]}", str(detail["loc"][0]), known)
        if detail["type"] == "extra_forbidden"
        else f"{prefix}{'.'.join(map(str, detail['loc']))}: {detail['msg'].removeprefix('Value error, ')}"
        for detail in error.errors()
    ]


def _unknown_key(place: str, key: str, known: Iterable[str]) -> str:
    known = set(known)
    engine_options = {entry.name for entry in options_of(EngineConfig)} if "engine" in known else set()
    meant = RENAMED.get(key, key)
    if meant in engine_options:
        return f"{place}: unknown key; it belongs under engine, as {meant}"

    def spell(name: str) -> str:
        return f"{name}, under engine" if name in engine_options else name

    all_of_them = f"known are {', '.join(sorted(known))}"
    return f"{place}: unknown key; {unknown_option(key, known | engine_options, spell, all_of_them)}"


def _unknown_keys(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Walk value and type side by side, into pydantic models only; a plain dict may hold any key."""
    model = _model_in(kind)
    if model is None:
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, model, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            name = f"{where}.{key}" if where else str(key)
            if key in model.model_fields:
                yield from _unknown_keys(item, model.model_fields[key].annotation, name)
            else:
                yield _unknown_key(name, str(key), model.model_fields)


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The model that a type is, or holds as a list or an alternative."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    if typing.get_origin(kind) in (list, Union, types.UnionType):
        return next(filter(None, map(_model_in, typing.get_args(kind))), None)
    return None


if __name__ == "__main__":
    try:
        found = [problem for path in sys.argv[1:] for problem in check_serve_config(path)]
    except ConfigError as error:
        found = [error.message]
    sys.exit("\n".join(found) if found else 0)
