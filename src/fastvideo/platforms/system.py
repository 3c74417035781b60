"""A machine as data, so that selection can be asked about machines that aren't here.

Nothing is touched at import; `current_platform` asks torch and the installed distributions when it is first called.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

import torch

__all__ = ["OPTIONAL_PACKAGES", "System", "current_platform", "describe_system", "installed_packages", "is_older"]

OPTIONAL_PACKAGES = (
    "flash-attn-4",
    "flash-attn-3",
    "fa3-fwd",
    "flash-attn",
    "nvidia-cutlass-dsl",
    "nvidia-cudnn-frontend",
    "sageattention",
    "triton",
)
"""Distributions that backends look for, by their names on PyPI."""

# A distribution that is of no use without the module that another one, for one release of CUDA, brings.
_MODULE_OF = {"nvidia-cutlass-dsl": "cutlass"}

_KNOWN_DEVICES: dict[str, tuple[str, tuple[int, int] | None]] = {
    "cpu": ("cpu", None),
    "mps": ("mps", None),
    "a100": ("cuda", (8, 0)),
    "a6000": ("cuda", (8, 6)),
    "rtx3090": ("cuda", (8, 6)),
    "l40s": ("cuda", (8, 9)),
    "rtx4090": ("cuda", (8, 9)),
    "h100": ("cuda", (9, 0)),
    "h200": ("cuda", (9, 0)),
    "h20": ("cuda", (9, 0)),
    "gh200": ("cuda", (9, 0)),
    "b200": ("cuda", (10, 0)),
    "gb200": ("cuda", (10, 0)),
    "b300": ("cuda", (10, 3)),
    "rtx5090": ("cuda", (12, 0)),
    "mi300x": ("rocm", (9, 4)),
    "mi355x": ("rocm", (9, 5)),
}


@dataclass(frozen=True)
class System:
    """One machine.

    Attributes:
        platform: `"cpu"`, `"cuda"`, `"rocm"` or `"mps"`.
        device_name: Name of the device, for people.
        capability: Compute capability, such as `(9, 0)`; `None` where there is none.
        packages: `(distribution, version)` of the optional packages that are installed.
        described: The machine was described by the caller and isn't necessarily this one.
    """

    platform: str
    device_name: str
    capability: tuple[int, int] | None = None
    packages: tuple[tuple[str, str], ...] = ()
    described: bool = False

    @property
    def device_type(self) -> str:
        """The `torch.device` type: torch calls ROCm devices `"cuda"` too."""
        return "cuda" if self.platform == "rocm" else self.platform

    def version_of(self, package: str) -> str | None:
        """Return the version of an installed optional package, or `None`."""
        return dict(self.packages).get(package)

    def __str__(self) -> str:
        capability = "" if self.capability is None else f" (capability {self.capability[0]}.{self.capability[1]})"
        packages = ", ".join(f"{name} {version}" for name, version in self.packages) or "no optional packages"
        return f"{self.device_name}{capability}, {packages}"


@functools.cache
def installed_packages() -> tuple[tuple[str, str], ...]:
    """Return `(distribution, version)` of every optional package installed here, without importing any."""
    found = []
    for name in OPTIONAL_PACKAGES:
        if name in _MODULE_OF and importlib.util.find_spec(_MODULE_OF[name]) is None:
            continue
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


@functools.cache
def current_platform(device_type: str | None = None) -> System:
    """Return this machine as seen by tensors of `device_type`; by default its fastest device.

    Raises:
        ValueError: torch sees no device of that type here.

    Example:
        >>> current_platform("cpu").platform
        'cpu'
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("expected a CUDA device, torch sees none here; describe the machine instead, as in system='H200'")
        platform = "rocm" if torch.version.hip else "cuda"
        major, minor = torch.cuda.get_device_capability()
        return System(platform, torch.cuda.get_device_name(), (major, minor), installed_packages())
    return System(device_type, device_type.upper(), None, installed_packages())


def describe_system(description: str) -> System:
    """Return the machine that a short text describes.

    The text is a device name, then, separated by commas, what differs from a machine on which every optional package is
    installed: `no PACKAGE`, `PACKAGE==VERSION`, or `torch only`. `no flash-attn` means no generation of it.

    Raises:
        ValueError: The device or a package is unknown.

    Example:
        >>> describe_system("H200, no flash-attn").capability
        (9, 0)
    """
    device, *changes = [part.strip() for part in description.split(",")]
    key = re.sub(r"[\s_-]|nvidia|amd", "", device.lower())
    if key not in _KNOWN_DEVICES:
        raise ValueError(f"unknown device {device!r} in {description!r}; known are {', '.join(_KNOWN_DEVICES)}")
    platform, capability = _KNOWN_DEVICES[key]
    packages = dict.fromkeys(OPTIONAL_PACKAGES, "latest")
    for change in filter(None, changes):
        if change.lower() == "torch only":
            packages.clear()
            continue
        without, name, version = _parse_package_change(change, description)
        if without:
            for package in _packages_meant(name):
                packages.pop(package, None)
        else:
            packages[name] = version
    return System(platform, device, capability, tuple(packages.items()), described=True)


def is_older(version: str, minimum: tuple[int, ...]) -> bool:
    """Return whether a version's numbers come before `minimum`; numbers that it doesn't have count as enough.

    Example:
        >>> is_older("4.0.0b20", (4, 0, 0, 36)), is_older("4.0.0", (4, 0, 0, 36)), is_older("latest", (4,))
        (True, False, False)
    """
    numbers = tuple(map(int, re.findall(r"\d+", version)))
    return numbers < minimum[: len(numbers)]


def _parse_package_change(change: str, description: str) -> tuple[bool, str, str]:
    match = re.fullmatch(r"(no |with |)([A-Za-z0-9_-]+)(?:==(\S+))?", change, flags=re.IGNORECASE)
    name = match[2].lower().replace("_", "-") if match else ""
    if match is None or name not in OPTIONAL_PACKAGES:
        known = ", ".join(OPTIONAL_PACKAGES)
        raise ValueError(
            f"can't read {change!r} in {description!r}; expected 'no PACKAGE', 'PACKAGE==VERSION' or 'torch only', "
            f"with a package of {known}"
        )
    return match[1].lower().startswith("no"), name, match[3] or "latest"


def _packages_meant(name: str) -> tuple[str, ...]:
    """Return the distributions that are absent by a name: without `flash-attn` there is no generation of it."""
    return ("flash-attn-4", "flash-attn-3", "fa3-fwd", "flash-attn") if name == "flash-attn" else (name,)
