"""`python -m allmlp`."""

import sys

from allmlp.cli import main

sys.exit(main())
