"""LightningCLI for R-Drop, with one-line error messages."""

from lightning_rdrop.lightning_cli.error_messages import explain
from lightning_rdrop.lightning_cli.failures import is_message
from lightning_rdrop.lightning_cli.rdrop_cli import RDropCLI

__all__ = ["RDropCLI", "explain", "is_message"]
