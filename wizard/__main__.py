"""`python -P -m crumb.wizard` is `crumb`."""

import sys

from crumb.wizard.cli import main

sys.exit(main())
