"""``python -m ascend_sp COMMAND ...``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ascend_sp.runtime.errors import AscendSPError

COMMANDS = {
    "explain": "what the backend would do with a model at its real size, on a laptop",
    "calibrate": "measure the rates of this device and its links, for estimates",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ascend_sp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given[:1])  # what follows, --help too, is the command's
    command = importlib.import_module(f"ascend_sp.command.{args.command}")
    try:
        return int(command.main(given[1:]) or 0)
    except AscendSPError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
