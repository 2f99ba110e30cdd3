"""Who may ask, and for how much: API keys, each of which stands for a tenant.

Keeps hashes of keys only; knows no HTTP library and no engine.

    python -m deployments.tenants new acme     # a new key, and the lines for the file; the key itself is kept nowhere

The file (YAML), named by the application's argument `tenants_file`:

    tenants:
    - id: acme
      api_keys_sha256: [9f86d081884c7d65...]
      weight: 2.0                  # share of an engine where several tenants want more than there is; 1 if left out
      max_concurrent_requests: 64  # these limits are for the whole application; none if left out
      tokens_per_minute: 200000
      max_stored_bytes: 2147483648 # of the conversation store; the application's own (deployments/options.py) if left out
      max_stored_rows: 1000000
      store_requests_per_minute: 600
      store_bytes_per_minute: 16777216
      operator: true               # may see where the chunks of all tenants' conversations lie; false if left out

A changed file is read again within seconds: new keys work, and those that are no longer in it do not.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.errors import AuthenticationError
from engine.errors import ConfigError
from engine.tenant import Tenant

logger = logging.getLogger("ray.serve")

API_KEY_VARIABLE = "PENSIEVE_API_KEY"
KEY_PREFIX = "sk-pensieve-"
# How often the file is looked at, in seconds.
WATCH_PERIOD_S = 2.0


class TenantConfig(BaseModel):
    """One tenant and its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="The tenant's name in logs and metrics.")]
    api_keys_sha256: Annotated[
        tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...],
        Field(
            min_length=1,
            description="SHA-256 hashes of its keys, in hex; `python -m deployments.tenants new` makes one.",
        ),
    ]
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="Its share of an engine, when several tenants want more than there is."
    )
    max_concurrent_requests: int | None = Field(
        default=None, ge=1, description="Most requests at once in the whole application. None: any number."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Most tokens a minute in the whole application. None: any number."
    )
    max_stored_bytes: int | None = Field(
        default=None, ge=0, description="Most bytes in the conversation store. None: the application's limit."
    )
    max_stored_rows: int | None = Field(
        default=None, ge=0, description="Most rows in the conversation store. None: the application's limit."
    )
    store_requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Most requests a minute to the paths that only store. None: the application's limit.",
    )
    store_bytes_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Most bytes a minute to the paths that only store. None: the application's limit.",
    )
    operator: bool = Field(
        default=False,
        description="Its keys may load and unload adapters, and see where the chunks of all tenants' conversations lie, "
        "though not what was said.",
    )

    @field_validator("api_keys_sha256")
    @classmethod
    def _check_not_empty(cls, hashes: tuple[str, ...]) -> tuple[str, ...]:
        if hash_key("") in hashes:  # the hash of an unset variable: every client would have that key
            raise ValueError("one of them is the hash of an empty key; hash the key itself")
        return hashes

    @property
    def tenant(self) -> Tenant:
        return Tenant(self.id, self.weight)


class _TenantsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: Annotated[tuple[TenantConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_unique(self) -> _TenantsFile:
        for what, values in (
            ("tenant id", [tenant.id for tenant in self.tenants]),
            ("API key", [key for tenant in self.tenants for key in tenant.api_keys_sha256]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"the same {what} is given twice")
        return self


def load_tenants(path: str | None, environment: Mapping[str, str]) -> tuple[TenantConfig, ...]:
    """The tenants of the file, and with PENSIEVE_API_KEY in the environment one more, "default". Raises ConfigError."""
    return _joined(() if path is None else _read(path), environment_tenants(environment))


def environment_tenants(environment: Mapping[str, str]) -> tuple[TenantConfig, ...]:
    """The one of PENSIEVE_API_KEY, if it is set."""
    key = environment.get(API_KEY_VARIABLE)
    return (TenantConfig(id="default", api_keys_sha256=(hash_key(key),)),) if key else ()


def _read(path: str) -> tuple[TenantConfig, ...]:
    try:
        return _TenantsFile.model_validate(yaml.safe_load(Path(path).read_text())).tenants
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the tenants file cannot be read: {error}", param="tenants_file") from error
    except ValidationError as error:
        # Without the input: there may be a key in it that was meant to be hashed.
        detail = error.errors(include_input=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise ConfigError(f"{path}: {place}: {detail['msg']}", param="tenants_file") from None


def _joined(of_file: tuple[TenantConfig, ...], of_environment: tuple[TenantConfig, ...]) -> tuple[TenantConfig, ...]:
    if of_environment and any(tenant.id == "default" for tenant in of_file):
        raise ConfigError(
            f"{API_KEY_VARIABLE} defines the tenant 'default', but the file has one, too; rename that or unset the variable",
            param="tenants_file",
        )
    return of_file + of_environment


class WatchedTenants:
    """The tenants of a file as it is now.

    A file that is missing or wrong changes nothing: the tenants that were in force stay, and the log says so once.
    """

    def __init__(self, path: str, of_environment: tuple[TenantConfig, ...]) -> None:
        """of_environment: those that are there besides, whatever the file says."""
        self._path = path
        self._of_environment = of_environment
        self._state: tuple[int, int, int] | None = (0, 0, 0)  # no file's

    def read_if_changed(self) -> tuple[TenantConfig, ...] | None:
        """All tenants; None if nothing is new. Blocking."""
        try:
            status = Path(self._path).stat()
            state = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            state = None
        if state == self._state:
            return None
        self._state = state
        try:
            tenants = _joined(_read(self._path), self._of_environment)
        except ConfigError as error:
            logger.error("%s. The API keys that were in force still are", error.message)
            return None
        logger.info("%d tenants are in force, of %s", len(tenants), self._path)
        return tenants

    async def watch(self, use: Callable[[tuple[TenantConfig, ...]], None]) -> None:
        """Calls `use` with the tenants whenever they have changed, for ever."""
        while True:
            if (tenants := await asyncio.to_thread(self.read_if_changed)) is not None:
                use(tenants)
            await asyncio.sleep(WATCH_PERIOD_S)


def hash_key(key: str) -> str:
    """SHA-256, in hex. Plain, because a key has 256 random bits: there is nothing to guess."""
    return hashlib.sha256(key.encode()).hexdigest()


class Authenticator:
    """From the headers with an API key to the tenant."""

    def __init__(self, tenants: Sequence[TenantConfig]) -> None:
        self.use(tenants)

    def use(self, tenants: Sequence[TenantConfig]) -> None:
        """From now on, these."""
        self._tenants = tuple((key_hash, tenant.tenant) for tenant in tenants for key_hash in tenant.api_keys_sha256)
        self._operators = frozenset(tenant.id for tenant in tenants if tenant.operator)

    def is_operator(self, tenant: Tenant) -> bool:
        """Whether that tenant's keys may see more than what is its own."""
        return tenant.tenant_id in self._operators

    def authenticate(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        """Raises AuthenticationError.

        authorization, api_key: the headers authorization and x-api-key; the second one counts only without the first one.
        """
        scheme, _, key = (f"Bearer {api_key or ''}" if authorization is None else authorization).partition(" ")
        presented = hash_key(key.strip() if scheme.lower() == "bearer" else "")
        found: Tenant | None = None
        for key_hash, tenant in self._tenants:  # all of them, whichever fits: the time tells nothing
            if hmac.compare_digest(key_hash, presented):
                found = tenant
        if found is None:
            raise AuthenticationError(
                "the API key is missing or unknown; send 'Authorization: Bearer ' or 'x-api-key: ' and your tenant's key"
            )
        return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "new":
        print("usage: python -m deployments.tenants new TENANT_ID", file=sys.stderr)
        return 2
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    config = TenantConfig(id=arguments[1], api_keys_sha256=(hash_key(key),))
    print(f"key (shown once): {key}", file=sys.stderr)
    print(f"- id: {config.id}\n  api_keys_sha256: [{config.api_keys_sha256[0]}]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
