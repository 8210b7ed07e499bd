"""The errors fedpace raises on purpose.

    FedpaceError
    ├── ConfigError          wrong usage or configuration: exit code 2
    │   ├── AppError         an app folder that cannot be run
    │   └── CertificateError a certificate, key or authority that cannot be used
    ├── RefusedError         the other side said no, with its reason
    ├── RunError             the run failed: exit code 1
    └── PayloadError         bytes from a peer that do not say what they should

Every message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class FedpaceError(Exception):
    """Root of every error fedpace raises on purpose."""


class ConfigError(FedpaceError):
    """Wrong usage or configuration; a command ends with exit code 2."""


class AppError(ConfigError):
    """A Flower app folder that is missing something, or cannot be loaded."""


class CertificateError(ConfigError):
    """A certificate, key or authority that is missing, expired, foreign or malformed."""


class RefusedError(FedpaceError):
    """The other side refused: another app, another name, a place already taken."""


class RunError(FedpaceError):
    """The run failed; a command ends with exit code 1."""


class PayloadError(FedpaceError):
    """Bytes from a peer that are truncated, oversized, of the wrong shape or dtype, or not finite."""
