"""`python -m millstream` is the `millstream` command."""

from .ui.cli import main

raise SystemExit(main())
