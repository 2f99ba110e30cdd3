"""Who may ask, and for how much: API keys, each of which stands for a tenant. Keeps hashes of keys only; knows no HTTP
library and no engine.

    python -m deployments.tenants new acme     # a new key, and the lines for the file; the key itself is kept nowhere

The file (YAML), named by the application's argument `tenants_file`:

    tenants:
    - id: acme
      api_keys_sha256: [9f86d081884c7d65...]
      weight: 2.0                  # share of an engine where several tenants want more than there is; 1 if left out
      max_concurrent_requests: 64  # both limits are for the whole application; none if left out
      tokens_per_minute: 200000
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import ConfigError, RequestError
from engine.tenant import LOCAL_TENANT, Tenant

API_KEY_VARIABLE = "PENSIEVE_API_KEY"
KEY_PREFIX = "sk-pensieve-"
LOOPBACK = ("127.", "::1", "::ffff:127.", "localhost")


class AuthenticationError(RequestError):
    """No key, or none that is known."""

    http_status = 401
    code = "invalid_api_key"


class RemoteWithoutKeysError(RequestError):
    """Somebody on another machine asks a server that cannot tell tenants apart."""

    http_status = 403
    code = "no_api_keys_configured"


class TenantConfig(BaseModel):
    """One tenant and its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    api_keys_sha256: Annotated[tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...], Field(min_length=1)]
    weight: float = Field(default=1.0, gt=0, le=1000)
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)

    @field_validator("api_keys_sha256")
    @classmethod
    def _check_not_empty(cls, hashes: tuple[str, ...]) -> tuple[str, ...]:
        if hash_key("") in hashes:  # of a variable that was not set: everybody would have that key
            raise ValueError("one of them is the hash of nothing; hash the key itself")
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
                raise ValueError(f"the same {what} twice")
        return self


def load_tenants(path: str | None, environment: Mapping[str, str]) -> tuple[TenantConfig, ...]:
    """The tenants of the file, and with PENSIEVE_API_KEY in the environment one more, "default". Raises ConfigError."""
    tenants: tuple[TenantConfig, ...] = ()
    if path is not None:
        try:
            tenants = _TenantsFile.model_validate(yaml.safe_load(Path(path).read_text())).tenants
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"the tenants file cannot be read: {error}", param="tenants_file") from error
        except ValidationError as error:
            # Without the input: there may be a key in it that was meant to be hashed.
            detail = error.errors(include_input=False)[0]
            place = ".".join(map(str, detail["loc"]))
            raise ConfigError(f"{path}: {place}: {detail['msg']}", param="tenants_file") from None
    key = environment.get(API_KEY_VARIABLE)
    if key:
        if any(tenant.id == "default" for tenant in tenants):
            raise ConfigError(
                f"{API_KEY_VARIABLE} stands for the tenant 'default', which the file has too; rename or unset one of them",
                param="tenants_file",
            )
        tenants += (TenantConfig(id="default", api_keys_sha256=(hash_key(key),)),)
    return tenants


def hash_key(key: str) -> str:
    """SHA-256, in hex. Plain, because a key has 256 random bits: there is nothing to guess."""
    return hashlib.sha256(key.encode()).hexdigest()


class Authenticator:
    """From the Authorization header to the tenant. Without tenants, everybody on this machine is the local one; where it
    cannot be seen who is (sees_clients), nobody."""

    def __init__(self, tenants: Sequence[TenantConfig], *, sees_clients: bool = True) -> None:
        self.is_open = not tenants
        self._sees_clients = sees_clients
        self._tenants = tuple((key_hash, tenant.tenant) for tenant in tenants for key_hash in tenant.api_keys_sha256)

    def authenticate(self, authorization: str | None, client_host: str | None) -> Tenant:
        """Raises AuthenticationError, or RemoteWithoutKeysError."""
        if self.is_open:
            if not self._sees_clients:
                raise RemoteWithoutKeysError(
                    "no API keys are configured, and behind HAProxy every client looks like this machine; set tenants_file "
                    f"or {API_KEY_VARIABLE}, see deployments/tenants.py"
                )
            if client_host is not None and not client_host.startswith(LOOPBACK):
                raise RemoteWithoutKeysError(
                    "no API keys are configured, so only this machine is served; set tenants_file, see deployments/tenants.py"
                )
            return LOCAL_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        presented = hash_key(key.strip() if scheme.lower() == "bearer" else "")
        found: Tenant | None = None
        for key_hash, tenant in self._tenants:  # all of them, whichever fits: the time tells nothing
            if hmac.compare_digest(key_hash, presented):
                found = tenant
        if found is None:
            raise AuthenticationError(
                "the API key is missing or unknown; send 'Authorization: Bearer ' and the key of your tenant"
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
