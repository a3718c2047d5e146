"""`python -m qtensor`: the same as the `qtensor` command."""

import sys

from .cli.main import main

sys.exit(main())
