"""What this machine is, or a described one: its device, its capability and the optional packages it has."""

from fastvideo.platforms.backend_enum import AttentionBackendEnum
from fastvideo.platforms.system import System, current_platform, describe_system

__all__ = ["AttentionBackendEnum", "System", "current_platform", "describe_system"]
