"""`python -m structrep` is the command `structrep`."""

from structrep.cli import app

if __name__ == "__main__":
    app(prog_name="structrep")
