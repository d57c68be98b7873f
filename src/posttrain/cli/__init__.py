"""cli: parse and print. The command line takes words, calls a recipe or a room, and prints what came back.

May import every room, each inside the command that needs it: `posttrain --help` loads no torch.
"""

from posttrain.cli.main import main

__all__ = ["main"]
