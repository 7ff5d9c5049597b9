"""`python -m labsupport.cli` is `labs`."""

from labsupport.cli import app

app()
