"""The command `structrep`, also as `python -m structrep`."""

import contextlib
import io
import os
import re
import sys
import warnings


def main() -> None:
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where nothing needs it
    try:
        from structrep.cli import app
    except KeyboardInterrupt:  # importing torch takes seconds
        print("interrupted: before the command was begun", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("_STRUCTREP_COMPLETE") == "complete_bash":
        there = _joined()
        with contextlib.redirect_stdout(io.StringIO()) as completions, contextlib.suppress(SystemExit):
            app(prog_name="structrep")
        print(*(line.removeprefix(there) for line in completions.getvalue().splitlines()), sep="\n")
    else:
        app(prog_name="structrep")


def _joined() -> str:
    """Put together what bash takes apart at colons, `timm`, `:` and `resnet`.

    bash wants completions of the last piece alone: given is what stands before it.
    """
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    whole = re.sub(r"\n?:\n?", ":", "\n".join(words)).split("\n")
    os.environ |= {"COMP_WORDS": "\n".join(whole), "COMP_CWORD": str(len(whole) - 1)}
    return whole[-1] if words[-1] == ":" else whole[-1].removesuffix(words[-1])


if __name__ == "__main__":
    main()
