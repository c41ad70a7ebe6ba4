"""``python -m flora``: the command, where its script is not on the path."""

import sys

from flora_cli import main

sys.exit(main())
