"""`python -m benchmarks.reliability`: the scoreboard by itself."""

import typer

from benchmarks.reliability import reliability

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(reliability)
    app()
