"""`python -m baton` is the `baton` command."""

import sys

from baton.cli.main import main

sys.exit(main())
