"""Models and devices as numbers. Each constant says where it is from; measured ones are better where they can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from engine.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides how long its steps take and how large its KV is.

    num_active_parameters: that one token is multiplied with; None = all (fewer in a mixture of experts).
    bytes_per_value: of weights and KV.
    """

    num_parameters: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_active_parameters: float | None = None
    bytes_per_value: float = 2.0

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * self.bytes_per_value

    @property
    def flops_per_token(self) -> float:
        """Of everything but attention: a multiplication and an addition for each parameter."""
        return 2.0 * (self.num_active_parameters or self.num_parameters)

    @property
    def summed_bytes_per_token(self) -> float:
        """Of the activations that the devices of a group sum up, after attention and after the MLP of each layer."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.bytes_per_value

    @property
    def flops_per_pair(self) -> float:
        """Attention of one token to one other: query times key, and the weighted sum of values."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What of a device decides how long steps take; rates are per second, of bytes and of floating-point operations.

    num_devices: that share a model, each with these figures.
    matmul_efficiency: share of the peak that matrix products of many tokens reach. attention_flops_per_s: of prompts.
    hbm_efficiency: share of the bandwidth that reading weights reaches; kv_efficiency: that reading KV in decodes reaches.
    host_to_device, device_to_host: of copies between the tiers.
    interconnect_bytes_per_s: between the devices that share a model, in each direction; None = their sums take no time.
    step_overhead_s: of a step, whatever it computes; decode_overhead_s: of each request that decodes in it, besides.
    """

    flops_per_s: float
    hbm_bytes_per_s: float
    memory_bytes: float
    host_to_device: float = 25e9
    device_to_host: float = 25e9
    matmul_efficiency: float = 0.7
    attention_flops_per_s: float | None = None
    hbm_efficiency: float = 0.8
    kv_efficiency: float = 0.8
    interconnect_bytes_per_s: float | None = None
    step_overhead_s: float = 0.005
    decode_overhead_s: float = 0.0
    num_devices: int = 1


# From the models' own configurations. (Llama-2-13B is the paper's, with 10 KV heads instead of 40.)
MODELS: dict[str, ModelShape] = {
    "opt-13b": ModelShape(num_parameters=12.85e9, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128),
    "opt-66b": ModelShape(num_parameters=65.7e9, num_layers=64, num_heads=72, num_kv_heads=72, head_dim=128),
    "llama-2-13b-gqa": ModelShape(num_parameters=11.4e9, num_layers=40, num_heads=40, num_kv_heads=10, head_dim=128),
    "llama-2-70b": ModelShape(num_parameters=69e9, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128),
    "llama-3.1-8b": ModelShape(num_parameters=8.03e9, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
    "llama-3.1-70b": ModelShape(num_parameters=70.6e9, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128),
    "smollm2": ModelShape(num_parameters=0.1345e9, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
}
# Peaks from NVIDIA's data sheets (dense half precision, HBM, PCIe as copies reach it). The efficiencies of the A100 are read
# off the paper: Figure 3 (117 us a prompt token = 70 % of the peak; 0.50 us per token of context and decode step = 1.64 TB/s
# = 80 % of the bandwidth; 20.9 ms a step without context, of which the weights take 15.7 ms) and Figure 4 (attention of
# prompts at 36 TFLOP/s).
DEVICES: dict[str, Device] = {
    "a100-80gb": Device(
        flops_per_s=312e12,
        hbm_bytes_per_s=2.039e12,
        memory_bytes=80e9,
        attention_flops_per_s=36e12,
    ),
    "h100-80gb": Device(
        flops_per_s=989e12,
        hbm_bytes_per_s=3.35e12,
        memory_bytes=80e9,
        host_to_device=50e9,
        device_to_host=50e9,
        step_overhead_s=0.003,
    ),
    "h200-141gb": Device(
        flops_per_s=989e12,
        hbm_bytes_per_s=4.8e12,
        memory_bytes=141e9,
        host_to_device=50e9,
        device_to_host=50e9,
        step_overhead_s=0.003,
    ),
}

_Value = TypeVar("_Value", ModelShape, Device)


def find_model(value: str | Mapping[str, Any]) -> ModelShape:
    """By name, or from the fields of a ModelShape. Raises ConfigError."""
    return _find(value, MODELS, ModelShape, "model_shape")


def find_device(value: str | Mapping[str, Any]) -> Device:
    """By name, or from the fields of a Device; `base` names one that the others change. Raises ConfigError."""
    return _find(value, DEVICES, Device, "device")


def _find(value: str | Mapping[str, Any], known: Mapping[str, _Value], kind: type[_Value], param: str) -> _Value:
    if isinstance(value, str):
        if value not in known:
            raise ConfigError(
                f"unknown {param} {value!r}; there are {', '.join(known)}, or give its fields", param=param
            )
        return known[value]
    names: list[str] = [each.name for each in fields(kind)]
    if unknown := value.keys() - {*names, "base"}:
        raise ConfigError(f"{param} has no {', '.join(sorted(unknown))}; it has {', '.join(names)}", param=param)
    given = {name: number for name, number in value.items() if name != "base"}
    if wrong := [name for name, number in given.items() if not isinstance(number, int | float) or number <= 0]:
        raise ConfigError(f"{wrong[0]} of {param} must be a number above 0, got {given[wrong[0]]!r}", param=param)
    if "base" in value:
        base = _find(str(value["base"]), known, kind, param)
        given = {name: getattr(base, name) for name in names} | given
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{param} lacks a field ({error}); name one as `base` for the others", param=param) from error
