"""`torchrun --nproc_per_node=6 -m cxrfast.train`: the `cxrfast train` command as a module. Nothing imports it."""

import sys

from cxrfast.cli.main import cli

if __name__ == "__main__":
    cli(["train", *sys.argv[1:]], prog_name="cxrfast")
