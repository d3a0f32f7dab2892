"""LightningCLI for R-Drop, and how it says in one line what is wrong."""

from lightning_rdrop.lightning_cli.failures import is_message
from lightning_rdrop.lightning_cli.mistakes import explain
from lightning_rdrop.lightning_cli.rdrop_cli import RDropCLI

__all__ = ["RDropCLI", "explain", "is_message"]
