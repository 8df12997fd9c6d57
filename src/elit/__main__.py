"""`python -m elit` is `elit`."""

import sys

from elit.cli.main import main

sys.exit(main())
